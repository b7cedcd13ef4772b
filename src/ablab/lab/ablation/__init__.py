"""Ablations: from a grid written as data to a table with uncertainty, figures and a verdict."""
