"""Report on a run while it trains: terminal, timing, profiles, pictures, Weights & Biases, TensorBoard.

The training path, analysis/, doctor/ and launch/ import it. It imports no other room.
"""
