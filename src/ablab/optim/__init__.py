"""Optimizers, weight decay groups and learning rate schedules."""
