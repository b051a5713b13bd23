"""How to run: one module per command; cli.py lists them.

No folder may import it.
"""
