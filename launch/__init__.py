"""How to run: one module per command."""
