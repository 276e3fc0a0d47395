"""Small training runs for tests: their recipe, what they logged, and what they leave in the process."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

from teachercache.student.training.train_recipe import TrainRecipe

CONTENT: dict[str, Any] = {
    "student": {"stem": "test_vit", "pretrained": False},
    "schedule": {"max_steps": 8, "warmup_steps": 2},
    "batch_size_per_process": 2,
    "mixed_precision": "no",
    "checkpoint_every_steps": 3,
    "keep_checkpoints": 10,
    "picture_every_steps": 0,
    "loader": {"threads": 2},
}


def train_recipe(cache: str | Path, output: str | Path, **changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(CONTENT | {"cache": str(cache), "output": str(output)} | changes)


def logged(output: str | Path, key: str = "loss") -> list[float]:
    """What `metrics.jsonl` holds under `key`, and that it holds every step once and in order."""
    rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row[key] for row in rows]


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """Nothing can be written behind so many bytes of a file: EFBIG, as ENOSPC on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
