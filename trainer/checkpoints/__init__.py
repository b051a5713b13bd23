"""Save and load training state: the files of a checkpoint, the thread that writes them, the lock of a run's folder.

The training path, analysis/ and launch/ import it. It imports distributed/ and, from trainer's root, state.py.
"""
