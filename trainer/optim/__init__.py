"""The mathematics of a step: losses, optimizers, learning rates, weight averages, clipping, freezing.

Imports distributed/ and models/.
"""
