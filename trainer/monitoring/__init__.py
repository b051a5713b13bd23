"""Report on a run while it trains: terminal, timing, profiles, pictures, Weights & Biases, TensorBoard.

Imports distributed/, checkpoints/ and stopping/, never the training path.
"""
