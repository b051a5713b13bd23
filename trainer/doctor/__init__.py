"""Check a machine or an allocation before a run: what each process sees, findings with their remedies, speed.

For launch/; the training path does not import it.
"""
