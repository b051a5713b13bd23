"""End a run in time: requests to stop, the allocation's time limit, the watchdog for hung ranks.

Imports distributed/.
"""
