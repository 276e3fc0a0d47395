"""What a build shows: a live bar on a terminal, or one line per shard in a log; and what it waited for."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from teachercache.pipeline.records.manifest import CommitRecord

STAGES = ("read", "decode", "forward", "encode", "statistics", "write")
_ADVICE = {
    "read": "faster or nearer source images",
    "decode": "more runner.decode_threads, or more CPU cores per GPU",
    "encode": "a cheaper codec",
    "statistics": "covariance: false",
    "write": "a faster disk, or a smaller codec and grid",
}


class StageSeconds:
    """Adds up seconds by stage; the stages run in several threads, so their sum may exceed the wall time."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        with self._lock:
            self.totals[name] += time.perf_counter() - start


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

    def of(self, shards: int) -> Progress:
        """The bar of so many shards, to be entered."""
        self._total = shards
        self._bar.update(self._task, total=shards)
        return self._bar

    @property
    def shards(self) -> int:
        return len(self.counted)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._start

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
        rate, stages = self.views / self.wall_s, _stages(self.seconds)
        self._bar.update(self._task, completed=self.shards, rate=rate, stages=stages)
        if not self._console.is_terminal:
            left_s = (self._total - self.shards) * self.wall_s / self.shards
            self._console.print(
                f"{self.shards}/{self._total} shards · {rate:.2f} img/s · ETA {left_s:.0f} s · "
                f"shard {record.shard} on {record.host}: {record.num_rows} views in "
                f"{record.seconds['wall']:.1f} s ({_stages(record.seconds)})",
                soft_wrap=True,
            )

    def bottleneck(self, shards_in_flight: int) -> str:
        """One sentence that says what the build waited for."""
        share = min(shards_in_flight * self.seconds["forward"] / self.seconds["wall"], 1.0)
        if share >= 0.8:
            return f"The teachers are the bottleneck: their forward passes take {share:.0%} of the time."
        other = max(_ADVICE, key=self.seconds.__getitem__)
        return (
            f"The teachers wait: their forward passes take {share:.0%} of the time, "
            f"the largest other stage is {other}. It would help to have {_ADVICE[other]}."
        )


def _stages(seconds: Mapping[str, float]) -> str:
    return " ".join(f"{stage} {seconds[stage]:.1f}s" for stage in STAGES)
