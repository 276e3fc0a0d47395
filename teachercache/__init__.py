"""Run frozen vision teachers once, cache their features, distil students from the cache.

from teachercache import CachedTeachers, FeatureCache, load_student

The folders of the checkout are packages of this one: teachercache.pipeline, .cache_builder, .student and
.jobs are links to them, and real folders in a wheel. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachercache.cache_builder.builder import build
    from teachercache.cache_builder.teachers import build_teacher
    from teachercache.jobs.distill import distill
    from teachercache.pipeline.cache import FeatureCache
    from teachercache.pipeline.loading.cached_teachers import CachedTeachers, ShardBatches
    from teachercache.pipeline.records.view_policy import ViewPolicy
    from teachercache.pipeline.views import View, render_view
    from teachercache.student.build import build_student, load_student

_HOMES = {
    "CachedTeachers": "teachercache.pipeline.loading.cached_teachers",
    "FeatureCache": "teachercache.pipeline.cache",
    "ShardBatches": "teachercache.pipeline.loading.cached_teachers",
    "View": "teachercache.pipeline.views",
    "ViewPolicy": "teachercache.pipeline.records.view_policy",
    "build": "teachercache.cache_builder.builder",
    "build_student": "teachercache.student.build",
    "build_teacher": "teachercache.cache_builder.teachers",
    "distill": "teachercache.jobs.distill",
    "load_student": "teachercache.student.build",
    "render_view": "teachercache.pipeline.views",
}
_PACKAGES = ("cache_builder", "jobs", "pipeline", "student")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CachedTeachers",
    "FeatureCache",
    "ShardBatches",
    "View",
    "ViewPolicy",
    "build",
    "build_student",
    "build_teacher",
    "distill",
    "load_student",
    "render_view",
]
