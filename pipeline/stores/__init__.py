"""Shards of features: how they are written, and who reads them from where they lie."""
