"""The data plane: sources, views, codecs, stores, and the cache that training reads."""

if __name__ == "pipeline":
    raise ImportError("`pipeline` is imported as `teachercache.pipeline`")

from teachercache.pipeline.lazy_names import lazy

_HOMES = {
    "FeatureCache": "cache",
    "View": "views",
    "ViewPolicy": "records.view_policy",
    "render_view": "views",
}
__getattr__ = lazy(__name__, _HOMES)
__all__ = [*_HOMES]
