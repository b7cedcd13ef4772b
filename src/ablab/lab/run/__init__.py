"""Runs: the folder of a run, with its settings, code, environment and results."""
