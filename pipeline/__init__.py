"""The data plane: sources, views, codecs, stores, and the cache that training reads.

Names are imported on first use, since teachers, codecs and losses use parts of this package without the
stores' dependencies (zarr).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "pipeline":
    raise ImportError("`pipeline` is imported as `teachercache.pipeline`")

if TYPE_CHECKING:
    from teachercache.pipeline.cache import FeatureCache
    from teachercache.pipeline.records.view_policy import ViewPolicy
    from teachercache.pipeline.views import View, render_view

_HOMES = {
    "FeatureCache": "teachercache.pipeline.cache",
    "View": "teachercache.pipeline.views",
    "ViewPolicy": "teachercache.pipeline.records.view_policy",
    "render_view": "teachercache.pipeline.views",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["FeatureCache", "View", "ViewPolicy", "render_view"]
