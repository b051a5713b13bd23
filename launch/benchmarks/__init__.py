"""The benchmarks of `shardstep bench`, one per module, their tables, and the loops to compare with.

Imported by launch/bench.py.
"""
