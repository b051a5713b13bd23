"""The mathematics of a step: losses, optimizers, learning rates, weight averages, clipping, freezing.

The training path and analysis/ import it. It imports distributed/ and models/.
"""
