"""Shards of features: how they are written, and how they are read from disks and object stores."""
