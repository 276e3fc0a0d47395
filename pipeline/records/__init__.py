"""What a cache says of itself: spec, rows, tables, commit records, and the seals and limits on them."""
