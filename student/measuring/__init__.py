"""Measure a finished student: tasks, similarity to its teachers, linear probes, figures."""
