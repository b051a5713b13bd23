"""What `shardstep compare` plans, runs, reads and reports.

Imported by launch/compare.py and launch/same.py.
"""
