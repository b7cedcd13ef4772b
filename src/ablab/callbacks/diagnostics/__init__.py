"""Diagnostics: callbacks that measure a run during training without changing it. Each is off by default."""
