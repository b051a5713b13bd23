"""The benchmarks of `shardstep bench`, one a module, their tables, and the loops that they compare with.

Imported by launch/bench.py.
"""
