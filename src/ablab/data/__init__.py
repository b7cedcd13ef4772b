"""Data: one file a data set, each a `DataModule` that hands out whole batches in an order that the seed decides."""
