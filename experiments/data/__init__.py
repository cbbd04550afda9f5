"""Data in memory: where it comes from, and the batches that training takes from it."""
