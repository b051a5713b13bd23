"""Report on a run while it trains: terminal, timing, profiles, pictures, Weights & Biases, TensorBoard.

The training path, analysis/ and doctor/ import it. It imports distributed/, checkpoints/ and stopping/.
"""
