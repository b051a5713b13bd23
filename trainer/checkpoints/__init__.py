"""Save and load training state: the files of a checkpoint, the thread that writes them, the lock of a run's folder.

Imports distributed/ and kernels/, and of the root state.py and machine.py alone.
"""
