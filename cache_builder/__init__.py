"""The producer: teachers, extraction, runners, plan and repair."""

if __name__ == "cache_builder":
    raise ImportError("`cache_builder` is imported as `teachercache.cache_builder`")
