"""Loggers: CSV, W&B, TensorBoard and MLflow."""
