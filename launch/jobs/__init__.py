"""Slurm jobs: the script of a job, and following it.

Imported by the commands that submit.
"""
