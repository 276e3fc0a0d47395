"""Measure a finished student: tasks, similarity to its teachers, linear probes, figures."""

from teachercache.pipeline.errors import extra

with extra("train"):
    import accelerate  # noqa: F401
    import matplotlib  # noqa: F401
    import skimage  # noqa: F401
