"""Where the time of a step goes, and a sentence about what limits a run."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

STAGES = {
    "wait": "waiting for data",
    "targets": "making the targets",
    "forward": "the student's forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
}


class StageTimer:
    """Seconds of each stage. On CUDA the device takes them, so the host never waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begun = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by stage; the device must have finished its work."""
        for name, start, end in self._events:
            self.add(name, start.elapsed_time(end) / 1e3)
        taken = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return taken


def bottleneck(seconds: Mapping[str, float], steps: int) -> str:
    """One sentence on what a run spent its time on; `seconds` are the sums over `steps` steps.

    The loader's threads spend `read` and `decode` in parallel; they only tell what a wait was for.
    """
    total = sum(seconds.get(stage, 0.0) for stage in STAGES)
    if not total:
        return "No step was left to take."
    share = {stage: seconds.get(stage, 0.0) / total for stage in STAGES}
    worst = max(share, key=lambda stage: share[stage])
    sentence = f"Bottleneck: {STAGES[worst]}, {share[worst]:.0%} of {total / steps:.3g} s per step"
    if worst != "wait":
        return f"{sentence}; {STAGES['wait']} took {share['wait']:.0%}."
    read, decode = (seconds.get(stage, 0.0) / steps for stage in ("read", "decode"))
    what = "reading features" if read > decode else "decoding images"
    return (
        f"{sentence}, mostly for {what} (the threads spent {read:.3g} s reading and {decode:.3g} s decoding "
        "per step): raise loader.threads, or put the cache on a faster disk."
    )
