"""The recipe: its schema, its loader, the choice of what it leaves to `auto`, and the recipes themselves.

Every folder may import it; it imports none.
"""
