"""Code that a recipe names by import path: its contracts, checked at the start of a run, and its copy in the run's folder.

The training path and analysis/ import it. It imports optim/, whose functions it checks, and distributed/.
"""
