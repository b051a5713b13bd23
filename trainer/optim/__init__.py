"""The mathematics of a step: losses, optimizers, learning rates, averages, clipping, freezing.

Imports distributed/ and models/.
"""
