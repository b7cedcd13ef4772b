"""Measures: callbacks that look at a run while it trains, and never change it. Each is off by default."""
