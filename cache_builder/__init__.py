"""The producer: teachers, extraction, runners, plan and repair."""

if __name__ == "cache_builder":
    raise ImportError("`cache_builder` is imported as `teachercache.cache_builder`")

from teachercache.pipeline.lazy_names import lazy

_HOMES = {
    "BuildResult": "builder",
    "build": "builder",
    "build_teacher": "teachers",
    "extract_shard": "extract",
}
__getattr__ = lazy(__name__, _HOMES)
__all__ = [*_HOMES]
