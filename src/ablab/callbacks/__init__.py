"""Callbacks: what is done beside the training step. Each is off by default or part of what a person sees."""
