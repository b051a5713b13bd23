"""What to run: the recipe's schema, its loader, and the recipes themselves."""
