"""Faster convolutions and max pooling for training on a CPU, and the compiler for their C code.

Rooms that import it: none but the training path and doctor/. It imports no other room.
"""
