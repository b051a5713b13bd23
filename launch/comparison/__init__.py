"""The parts of `shardstep compare`: plan, pool of runs, results, statistics, report.

Imported by launch/compare.py and launch/same.py.
"""
