"""Optimization: which parameters are decayed, and how the learning rate moves."""
