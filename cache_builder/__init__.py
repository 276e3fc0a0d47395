"""The producer: teachers, extraction, runners, plan and verification.

Names are imported on first use, so that a teacher can be built where zarr is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_builder.builder import BuildResult, build
    from cache_builder.extract import extract_shard
    from cache_builder.teachers import build_teacher

_HOMES = {
    "BuildResult": "cache_builder.builder",
    "build": "cache_builder.builder",
    "build_teacher": "cache_builder.teachers",
    "extract_shard": "cache_builder.extract",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["BuildResult", "build", "build_teacher", "extract_shard"]
