"""What a build shows while it runs: a live bar on a terminal, one line per shard in a log."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from teachercache.cache_builder.stages import STAGES
from teachercache.pipeline.records.manifest import CommitRecord


class BuildProgress:
    """Counts committed shards and views; `seconds` are the stages' sums over all shards so far.

    `counted`: the shards that are counted.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0
        self._start = time.monotonic()
        self.counted = set[int]()
        self.views = 0
        self.seconds = dict.fromkeys((*STAGES, "wall"), 0.0)
        self._bar = Progress(
            TextColumn("building"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards · {task.fields[rate]:.2f} img/s · ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stages]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", rate=0.0, stages="")

    def of(self, shards: int) -> Self:
        """Set the number of shards to build."""
        self._total = shards
        self._bar.update(self._task, total=shards)
        return self

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def shards(self) -> int:
        return len(self.counted)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def views_per_s(self) -> float:
        return self.views / self.wall_s if self.wall_s else 0.0

    def on_commit(self, records: Mapping[str, CommitRecord]) -> None:
        if not records:  # another job committed it
            self._total -= 1
            self._bar.update(self._task, total=self._total)
            return
        record = next(iter(records.values()))
        self.counted.add(record.shard)
        self._total = max(self._total, self.shards)  # a late report can follow one for another job's shard
        self.views += record.num_rows
        for stage, value in record.seconds.items():
            self.seconds[stage] += value
        stages = _stages(self.seconds)
        self._bar.update(self._task, completed=self.shards, rate=self.views_per_s, stages=stages)
        if not self._console.is_terminal:
            left_s = (self._total - self.shards) * self.wall_s / self.shards
            self._console.print(
                f"{self.shards}/{self._total} shards · {self.views_per_s:.2f} img/s · ETA {left_s:.0f} s · "
                f"shard {record.shard} on {record.host}: {record.num_rows} views in "
                f"{record.seconds['wall']:.1f} s ({_stages(record.seconds)})",
                soft_wrap=True,
            )


def _stages(seconds: Mapping[str, float]) -> str:
    return " ".join(f"{stage} {seconds[stage]:.1f}s" for stage in STAGES)
