"""Batches for a trainer: which rows come when, and the memory they are read into."""
