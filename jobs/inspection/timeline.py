"""When a cache was built, from its commit records: which workers were busy, and how busy their teachers."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teachercache.jobs.inspection.summary import shard_span
from teachercache.pipeline.records.manifest import CommitRecord

_COLUMNS = 720
_MAX_LANES = 48


class Timeline(NamedTuple):
    """Times in Unix seconds. A lane is shards that one worker did one after the other: the worker and, for
    each of the columns between start and end, the share of time in the teachers' forward passes; NaN where
    the lane is idle. `hidden` lanes are left out."""

    start: float
    end: float
    lanes: list[tuple[str, NDArray[np.float64]]]
    hidden: int


def timeline(records: Iterable[CommitRecord]) -> Timeline | None:
    """None where no record says when it was made.

    Records of several teachers that were computed together count once. A lane takes the next shard that
    begins after its last one ended: with two shards in flight, an actor is two lanes. Records that name no
    worker (older ones) are of one worker a host.
    """
    work: dict[tuple[str, int, float], tuple[float, float]] = {}
    for record in records:
        if (span := shard_span(record)) and (wall := record.seconds.get("wall")):
            share = min(record.seconds.get("forward", 0.0) / wall, 1.0)
            work[record.worker or record.host, record.shard, span[1]] = span[0], share
    if not work:
        return None
    start = min(begin for begin, _ in work.values())
    end = max(finish for _, _, finish in work)
    column_s = max(end - start, 1e-3) / _COLUMNS
    ends: defaultdict[str, list[float]] = defaultdict(list)
    lanes: dict[tuple[str, int], NDArray[np.float64]] = {}
    for (worker, _, finish), (begin, share) in sorted(work.items(), key=lambda item: item[1][0]):
        free = [lane for lane, last in enumerate(ends[worker]) if last <= begin + 1]  # ends are whole seconds
        lane = free[0] if free else len(ends[worker])
        ends[worker][lane : lane + 1] = [finish]
        columns = lanes.setdefault((worker, lane), np.full(_COLUMNS, np.nan))
        first = min(int((begin - start) / column_s), _COLUMNS - 1)
        columns[first : max(int((finish - start) / column_s), first + 1)] = share
    shown = [(worker, forward) for (worker, _), forward in sorted(lanes.items())]
    return Timeline(start, end, shown[:_MAX_LANES], max(0, len(shown) - _MAX_LANES))
