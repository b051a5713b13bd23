"""Faster convolutions and max pooling for training on a CPU, and the compilation of their C code.

Only the training path, doctor/ and launch/benchmarks/ import it. It imports no other room.
"""
