"""Exact resume for any LightningModule with any data."""
