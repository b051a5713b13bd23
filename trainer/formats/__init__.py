"""Compute formats: the precision, memory format and convolution method of a step; which ones fit, and which one is fastest.

Only the training path and launch/ import it. It imports kernels/, models/ and optim/.
"""
