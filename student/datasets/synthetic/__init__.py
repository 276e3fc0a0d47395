"""Rendered scenes with exact labels, for tests and demonstrations where no data set may be had."""
