"""One self-contained page about a cache: what is in it, how it was built, and what the teachers see."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from teachercache.jobs.inspection.charts import channel_curve, coloured, error_curve, norm_histogram, number
from teachercache.jobs.inspection.feature_facts import CodecTrial, LevelFacts, linear_cka, try_codec
from teachercache.jobs.inspection.page import templates
from teachercache.jobs.inspection.summary import summarize
from teachercache.jobs.inspection.tables import quarantine_line, summary_facts, warnings, what_was_checked
from teachercache.jobs.inspection.teacher_maps import TeacherMaps
from teachercache.jobs.inspection.timeline import timeline
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import codec_names, get_codec
from teachercache.pipeline.errors import CodecError, TeacherCacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import heat, jpeg_uri, png_uri
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.pipeline.records.integrity import Depth, check_shards
from teachercache.pipeline.units import human_bytes, human_seconds

_TRIAL_ROWS = 2  # others are what the tables are learnt from
_LEAST_ERROR, _LARGEST_ERROR = 1e-7, 1e-1
_MAPS = 8  # as many as a page of a laptop is wide
_MAX_LISTED = 200
_MAX_LOUD = 3


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
    found = _records(cache, reader)
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
        found,
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


def _records(cache: FeatureCache, reader: MapReader) -> dict[str, Any]:
    """What the cache says of itself: what it is, what is broken, and how it was built."""
    summary = summarize(cache.storage)
    head, columns = summary_facts(summary)
    fields = list(next(iter(columns.values()), {}))
    absent = [f"{name} is not shown below: {reason}" for name, reason in reader.absent.items()]
    checked = check_shards(cache.manifest, cache.spec, Depth.RECORD)
    history = timeline(shard.record for shard in checked if shard.record is not None)
    found = {
        "warnings": warnings(summary),
        "head": head,
        "columns": columns,
        "fields": [[field, *(column[field] for column in columns.values())] for field in fields],
        "checked": what_was_checked(summary),
        "broken": _cut([*summary["problems"], *absent]),
        "num_quarantined": len(summary["quarantined"]),
        "quarantined": _cut([quarantine_line(entry) for entry in summary["quarantined"]]),
        "history": history,
    }
    if history is not None:
        found["begin"], found["end"] = (
            datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
            for time in (history.start, history.end)
        )
        found["lasted"] = human_seconds(history.end - history.start)
        found["lanes"] = [
            (lane.worker, png_uri(heat(torch.from_numpy(lane.forward)[None], 0, 1))) for lane in history.lanes
        ]
    return found


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
        f"{c.channel} ({c.mean:.3g} ± {c.std:.2g}, {c.share:.0%} of the energy)"
        for c in level.loud[:_MAX_LOUD]
    ]
    return [
        f"{level.norms_N.mean():.4g}",
        _count(level.dead),
        _count(level.not_finite),
        str(len(level.loud)),
        ", ".join(loudest) or "–",
    ]


def _codecs(reader: MapReader, teacher: TeacherMaps) -> tuple[int, list[list[str]], Markup, list] | None:
    """How many rows were tried; a line for each codec, a chart and maps of what it loses. None: no row."""
    rows = list(teacher.common_tokens)
    if not rows:
        return None
    tried = rows[: min(_TRIAL_ROWS, max(len(rows) // 2, 1))]
    others = rows[len(tried) :] or tried
    names = [n for n in codec_names() if n != teacher.spec.codec and get_codec(n).reported]
    found: dict[str, CodecTrial | str] = {}  # or why the codec cannot
    for name in names:
        try:
            found[name] = try_codec(name, reader, teacher.name, others, tried)
        except CodecError as error:
            found[name] = error.problem
    trials = [trial for trial in found.values() if isinstance(trial, CodecTrial)]
    curves = {trial.codec: trial.error_RSHW.flatten().numpy() for trial in trials}
    maps = [
        (
            [teacher.level_names[level] for level in levels],
            [(trial.codec, [_error_map(trial.error_RSHW[0, level]) for level in levels]) for trial in trials],
        )
        for levels in _divided(range(teacher.spec.num_levels), _MAPS)
        if trials
    ]
    facts = [_trial_facts(name, trial) for name, trial in found.items()]
    return len(tried), facts, error_curve(curves) if trials else Markup(), maps


def _trial_facts(codec: str, trial: CodecTrial | str) -> list[str]:
    if isinstance(trial, str):
        return [codec, *("–",) * 4, trial]
    fidelity = trial.fidelity
    return [
        codec,
        human_bytes(fidelity.row_bytes),
        f"{fidelity.cosine_mean:.6f}",
        f"{fidelity.cosine_p1:.6f}",
        f"{fidelity.relative_l2:.4f}",
        "",
    ]


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


def _cut(lines: Sequence[str]) -> list[str]:
    rest = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return [*lines[:_MAX_LISTED], *rest]


def _count(channels: Sequence[int]) -> str:
    if not channels:
        return "0"
    named = ", ".join(map(str, channels[:_MAX_LOUD]))
    return f"{len(channels)} ({named}{', …' if len(channels) > _MAX_LOUD else ''})"
