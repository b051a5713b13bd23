"""Stop a run in time: stop requests, the allocation's time limit, the watchdog for hung ranks.

The training path and monitoring/ import it. It imports distributed/.
"""
