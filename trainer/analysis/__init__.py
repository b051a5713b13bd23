"""Analyse a run from its folder: its model on its test set, predictions, exports, pages.

For launch/; the training path does not import it.
"""
