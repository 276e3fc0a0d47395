"""How a cache describes itself: spec, rows, tables, commit records, and their seals and limits."""
