"""New caches from caches, without a teacher and without decoding: `merge`, `subset`, `convert`.

Shards that stay whole are hard-linked where both caches are in one file system, and copied, with their
checksums compared, where they are not; nothing in a cache is ever written in place, so links do no harm. All
three go on where they were stopped: what the new cache has committed stays.
"""
