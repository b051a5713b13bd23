"""Analyse a run from its folder: its model on its test set, predictions, exports, pages; and what a run would read.

For launch/; the training path does not import it.
"""
