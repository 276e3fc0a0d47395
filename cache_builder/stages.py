"""Seconds spent in each stage of a build, and a sentence about the bottleneck."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STAGES = ("read", "decode", "forward", "encode", "statistics", "write")


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


def bottleneck_of_build(seconds: Mapping[str, float], wall: float) -> str:
    """One sentence that says what a build waited for. `seconds` and `wall` are sums over its shards."""
    share = min(seconds["forward"] / wall, 1.0) if wall else 0.0
    if share >= 0.8:
        return f"The teachers are the bottleneck: their forward passes take {share:.0%} of the time."
    other = max((stage for stage in STAGES if stage != "forward"), key=lambda stage: seconds[stage])
    advice = {
        "read": "faster or nearer source images",
        "decode": "more runner.decode_threads, or more CPU cores per GPU",
        "encode": "a cheaper codec",
        "statistics": "covariance: false",
        "write": "a faster disk, or a smaller codec and grid",
    }
    return (
        f"The teachers wait: their forward passes take {share:.0%} of the time, "
        f"the largest other stage is {other}. It would help to have {advice[other]}."
    )
