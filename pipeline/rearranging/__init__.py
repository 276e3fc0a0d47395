"""A cache made of other caches: merged, cut down, converted, exported."""
