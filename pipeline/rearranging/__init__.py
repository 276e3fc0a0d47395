"""New caches from caches, without a teacher and without decoding: `merge`, `subset`, `convert`.

Shards that stay whole are hard-linked where both caches are in one file system, and otherwise copied and
compared by checksum; nothing in a cache is ever written in place, so links do no harm. All three continue
where they were stopped: what the new cache has committed stays.
"""
