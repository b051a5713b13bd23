"""Stop a run in time: stop requests, the allocation's time limit, the watchdog for hung ranks.

The training path and launch/ import it. It imports distributed/.
"""
