"""Batches to trained weights. Start reading in loop.py."""
