"""Architectures: plain modules that receive their norm as a factory."""
