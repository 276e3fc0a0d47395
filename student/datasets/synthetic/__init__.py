"""Rendered scenes with exact labels, for tests and demonstrations without a data set."""
