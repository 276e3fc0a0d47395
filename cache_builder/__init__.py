"""The producer: teachers, extraction, runners, plan and repair.

Names are imported on first use, so that teachers can be built without zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "cache_builder":
    raise ImportError("`cache_builder` is imported as `teachercache.cache_builder`")

if TYPE_CHECKING:
    from teachercache.cache_builder.builder import BuildResult, build
    from teachercache.cache_builder.extract import extract_shard
    from teachercache.cache_builder.teachers import build_teacher

_HOMES = {
    "BuildResult": "teachercache.cache_builder.builder",
    "build": "teachercache.cache_builder.builder",
    "build_teacher": "teachercache.cache_builder.teachers",
    "extract_shard": "teachercache.cache_builder.extract",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["BuildResult", "build", "build_teacher", "extract_shard"]
