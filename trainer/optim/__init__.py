"""The mathematics of a step: losses, optimizers, learning rates, weight averages, clipping, freezing.

The training path, analysis/ and launch/ import it. It imports distributed/ and models/.
"""
