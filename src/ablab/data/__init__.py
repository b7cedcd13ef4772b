"""Data sets: each file defines a `DataModule` that yields whole batches in an order determined by the seed."""
