"""How fast features come from the disk into memory, beside what the bytes alone take.

    python -m benchmarks.read                    synthetic float16 features: 4 levels × 24×24 × 1024
    python -m benchmarks.read --cache PATH       rows of your own cache

Random order, warm page cache, memory that is reused; one process. Every repeat takes each reader in turn,
and what is reported are medians over repeats, of the ratios too. The loaders give ready batches, features
still encoded and images left out. tensorstore, litdata and MDS are measured where they are installed; they
are no dependencies of ours (docs/benchmarks.md). Prints a table and, last, one line of JSON.

The goals: reader at least 0.8 of pread, 8 times zarr-python, 5 times the tar; loader at least 0.7 of pread
and 5 times the DataLoader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.readers import LOADERS, READERS, Workload
from pipeline.cache import FeatureCache
from pipeline.loader import DEFAULT_PREFETCH
from tests.make_cache import make_cache, make_images, teacher_spec

GOALS = {  # (ours, the peer, at least)
    "reader / pread": ("ours", "raw pread", 0.8),
    "reader / zarr-python": ("ours", "zarr-python", 8),
    "reader / tar": ("ours", "Theia-style tar (in order)", 5),
    "loader / pread": ("ours, FeatureLoader", "raw pread", 0.7),
    "loader / DataLoader": ("ours, FeatureLoader", "torch DataLoader, 2 workers", 5),
}
