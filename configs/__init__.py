"""The recipe's schema, its loader, and the recipes themselves."""
