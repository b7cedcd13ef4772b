"""Runs: the folder that holds all that a run was and found."""
