"""The data plane: sources, views, codecs, stores, and the cache that training reads."""

if __name__ == "pipeline":
    raise ImportError("`pipeline` is imported as `teachercache.pipeline`")
