"""One self-contained page about a cache: what is in it, how it was built, and what the teachers see."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from teachercache.jobs.inspection.charts import channel_curve, coloured, error_curve, norm_histogram, number
from teachercache.jobs.inspection.feature_facts import LevelFacts, level_facts, linear_cka, try_codec
from teachercache.jobs.inspection.page import templates
from teachercache.jobs.inspection.summary import shard_span, summarize
from teachercache.jobs.inspection.tables import (
    cut,
    quarantine_line,
    summary_facts,
    warnings,
    what_was_checked,
)
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import codec_names, get_codec
from teachercache.pipeline.errors import CacheError, CodecError, TeacherCacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import finite, heat, jpeg_uri, png_uri, token_norms
from teachercache.pipeline.exploring.map_reader import MapReader, level_name
from teachercache.pipeline.grids import pool
from teachercache.pipeline.records.integrity import Depth, check_shards
from teachercache.pipeline.records.manifest import CommitRecord
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.units import human_bytes, human_seconds

_TRIAL_ROWS = 2  # others are what the tables are learnt from
_LEAST_ERROR, _LARGEST_ERROR = 1e-7, 1e-1
_MAPS = 8  # as many as a page of a laptop is wide
_MAX_LISTED = 200
_COLUMNS, _MAX_LANES = 720, 48  # of the timeline
_MAX_LOUD = 3
_COMMON_TOKENS = 2048  # of each level, to compare teachers by


class Timeline(NamedTuple):
    """Times in Unix seconds. A lane is shards that one worker did one after the other: the worker and, for
    each of the columns between start and end, the share of time in the teachers' forward passes; NaN where
    the lane is idle. `hidden` lanes are left out."""

    start: float
    end: float
    lanes: list[tuple[str, NDArray[np.float64]]]
    hidden: int


def write_report(
    cache: FeatureCache,
    *,
    num_samples: int = 12,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> str:
    """The page, as HTML. `progress` is told what is under way.

    Features are decoded one row at a time; statistics are over the rows that are shown.
    """
    reader = MapReader(cache, num_rows=num_samples, seed=seed)
    progress("records")
    records = _records(cache, reader)
    teachers = []
    for name in reader.teachers:
        progress(f"maps of {name}")
        teachers.append(TeacherMaps(reader, name))
    codecs = {}
    for teacher in teachers:
        progress(f"codecs on {teacher.name}")
        codecs[teacher.name] = _codecs(reader, teacher)
    progress("similarity")
    return templates.get_template("report.html").render(
        records,
        title=f"Teacher cache {cache.storage.url}",
        teachers=teachers,
        blocks=_levels_in_words(teachers),
        samples=[_sample(reader, row) for row in reader.rows],
        shown_levels=_divided(range(max((one.spec.num_levels for one in teachers), default=0)), _MAPS // 2),
        statistics={teacher.name: _statistics(teacher) for teacher in teachers},
        codecs=codecs,
        least=number(_LEAST_ERROR),
        largest=number(_LARGEST_ERROR),
        alike=_similarity(reader, teachers),
    )


class TeacherMaps:
    """What is kept of a teacher's maps once they are no longer in memory: pictures (data URIs by row and
    level), statistics by level, and tokens to compare with other teachers'.

    `level_names` are those that pictures use. `damaged` says why a row could not be read. `common_tokens`
    holds, for each row, (levels, n, C) tokens of places that are the same in all teachers.
    """

    def __init__(self, reader: MapReader, name: str) -> None:
        self.name = name
        self.spec = reader.cache.spec.teachers[name]
        self.level_names = [level_name(self.spec, level) for level in range(self.spec.num_levels)]
        self.damaged: dict[int, str] = {}
        self.pictures: dict[tuple[int, int], str] = {}
        self.norm_pictures: dict[tuple[int, int], str] = {}
        self.common_tokens: dict[int, Tensor] = {}
        self.levels = level_facts(self._kept_in_common(reader))
        if not self.levels:
            return
        for row, maps_SHWC in self._readable(reader):
            for level, (facts, map_HWC) in enumerate(zip(self.levels, maps_SHWC, strict=True)):
                self.pictures[row, level] = png_uri(reader.basis(name, level).picture(map_HWC))
                self.norm_pictures[row, level] = png_uri(heat(token_norms(map_HWC), *facts.norm_range))

    def _readable(self, reader: MapReader) -> Iterator[tuple[int, Tensor]]:
        for row in reader.rows:
            try:
                yield row, reader.maps(self.name, row)
            except CacheError as error:
                self.damaged[row] = in_a_line(error)

    def _kept_in_common(self, reader: MapReader) -> Iterator[Tensor]:
        """The readable maps (S, H, W, C); some tokens of each are kept, on the smallest of all grids."""
        grids = [reader.cache.spec.teachers[name].stored_grid for name in reader.teachers]
        smallest = GridSpec(kind="bilinear", size=(min(h for h, _ in grids), min(w for _, w in grids)))
        for row, maps_SHWC in self._readable(reader):
            tokens_SNC = pool(finite(maps_SHWC)[None], smallest)[0].flatten(1, 2)
            step = -(-len(reader.rows) * tokens_SNC.shape[1] // _COMMON_TOKENS)
            self.common_tokens[row] = tokens_SNC[:, ::step].clone()
            yield maps_SHWC


def _records(cache: FeatureCache, reader: MapReader) -> dict[str, Any]:
    """What the cache says of itself: what it is, what is broken, and how it was built."""
    summary = summarize(cache.storage)
    head, columns = summary_facts(summary)
    absent = [f"{name} is not shown below: {reason}" for name, reason in reader.absent.items()]
    checked = check_shards(cache.manifest, cache.spec, Depth.RECORD)
    history = timeline(shard.record for shard in checked if shard.record is not None)
    facts = {
        "warnings": warnings(summary),
        "head": head,
        "columns": columns,
        "fields": [
            [field, *(column[field] for column in columns.values())]
            for field in next(iter(columns.values()), {})
        ],
        "checked": what_was_checked(summary),
        "broken": cut([*summary["problems"], *absent], _MAX_LISTED),
        "num_quarantined": len(summary["quarantined"]),
        "quarantined": cut([quarantine_line(entry) for entry in summary["quarantined"]], _MAX_LISTED),
        "history": history,
    }
    if history is not None:
        facts["begin"], facts["end"] = (
            datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
            for time in (history.start, history.end)
        )
        facts["lasted"] = human_seconds(history.end - history.start)
        facts["lanes"] = [
            (worker, png_uri(heat(torch.from_numpy(forward)[None], 0, 1)))
            for worker, forward in history.lanes
        ]
    return facts


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


def _divided(levels: range, most: int) -> list[range]:
    return [levels[first : first + most] for first in range(0, len(levels), most)]


def _levels_in_words(teachers: Sequence[TeacherMaps]) -> str:
    """Which blocks the numbers above the columns are."""
    by_blocks = dict[tuple[int, ...], list[str]]()
    for teacher in teachers:
        by_blocks.setdefault(teacher.spec.block_indices, []).append(teacher.name)
    return " ".join(
        f"{'Level 1 is block' if len(blocks) == 1 else f'Levels 1 to {len(blocks)} are blocks'} "
        f"{', '.join(map(str, blocks))} of {', '.join(names)}."
        for blocks, names in by_blocks.items()
    )


def _sample(reader: MapReader, row: int) -> tuple[int, str, int, str, str]:
    """The row, its key and view, the picture (a data URI), or why there is none."""
    sample, view, _ = (int(number) for number in reader.cache.index.locate(row))
    key = reader.cache.key(sample)
    try:
        return row, key, view, jpeg_uri(reader.view(row)), ""
    except (TeacherCacheError, OSError) as error:
        return row, key, view, "", in_a_line(error)


def _statistics(teacher: TeacherMaps) -> tuple[Markup, Markup, list[list[str]]]:
    """Charts of the norms and of the channels, and a line for each level."""
    named = dict(zip(teacher.level_names, teacher.levels, strict=False))  # none where no row could be read
    norms = {name: level.norms_N.numpy() for name, level in named.items()}
    std = {name: level.std_C.numpy() for name, level in named.items()}
    rows = [[name, *_channel_facts(level)] for name, level in named.items()]
    return norm_histogram(norms), channel_curve(std), rows


def _channel_facts(level: LevelFacts) -> list[str]:
    loudest = [
        f"{c} ({level.mean_C[c]:.3g} ± {level.std_C[c]:.2g}, {level.share_C[c]:.0%} of the energy)"
        for c in level.loud[:_MAX_LOUD]
    ]
    counts = _count(level.dead), _count(level.not_finite), str(len(level.loud))
    return [f"{level.norms_N.mean():.4g}", *counts, ", ".join(loudest) or "–"]


def _codecs(reader: MapReader, teacher: TeacherMaps) -> tuple[int, list[list[str]], Markup, list] | None:
    """How many rows were tried; a line for each codec, a chart and maps of what it loses. None: no row."""
    rows = list(teacher.common_tokens)
    if not rows:
        return None
    tried = rows[: min(_TRIAL_ROWS, max(len(rows) // 2, 1))]
    others = rows[len(tried) :] or tried
    facts: list[list[str]] = []
    errors: dict[str, Tensor] = {}
    for codec in codec_names():
        if codec == teacher.spec.codec or not get_codec(codec).reported:
            continue
        try:
            lost, errors[codec] = try_codec(codec, reader, teacher.name, others, tried)
        except CodecError as error:
            facts.append([codec, *("–",) * 4, error.problem])
        else:
            cosines = f"{lost.cosine_mean:.6f}", f"{lost.cosine_p1:.6f}"
            facts.append([codec, human_bytes(lost.row_bytes), *cosines, f"{lost.relative_l2:.4f}", ""])
    if not errors:
        return len(tried), facts, Markup(), []
    curves = error_curve({codec: error_RSHW.flatten().numpy() for codec, error_RSHW in errors.items()})
    maps = [
        (
            [teacher.level_names[level] for level in levels],
            [(codec, [_error_map(error_RSHW[0, n]) for n in levels]) for codec, error_RSHW in errors.items()],
        )
        for levels in _divided(range(teacher.spec.num_levels), _MAPS)
    ]
    return len(tried), facts, curves, maps


def _error_map(error_HW: Tensor) -> str:
    low, high = np.log10(_LEAST_ERROR), np.log10(_LARGEST_ERROR)
    return png_uri(heat(error_HW.clamp_min(1e-12).log10(), low, high))


def _similarity(
    reader: MapReader, teachers: Sequence[TeacherMaps]
) -> tuple[list[str], list[list[tuple[str, str, str]]], int] | None:
    """The levels' names, a square of coloured similarities, and of how many tokens. None: of too few."""
    rows = [row for row in reader.rows if all(row in teacher.common_tokens for teacher in teachers)]
    sets = {
        f"{teacher.name} level {level + 1}": torch.cat([teacher.common_tokens[row][level] for row in rows])
        for teacher in teachers
        for level in range(teacher.spec.num_levels)
        if rows
    }
    num_tokens = min((len(tokens) for tokens in sets.values()), default=0)
    if num_tokens < 4:
        return None
    return list(sets), coloured(linear_cka(list(sets.values())).numpy()), num_tokens


def _count(channels: Sequence[int]) -> str:
    if not channels:
        return "0"
    named = ", ".join(map(str, channels[:_MAX_LOUD]))
    return f"{len(channels)} ({named}{', …' if len(channels) > _MAX_LOUD else ''})"
