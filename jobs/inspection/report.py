"""One self-contained page about a cache: what is in it, how it was built, and what the teachers see."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from teachercache.jobs.inspection.charts import channel_curve, coloured, error_curve, norm_histogram, number
from teachercache.jobs.inspection.feature_facts import CodecTrial, LevelFacts, linear_cka, try_codec
from teachercache.jobs.inspection.page import Section, html, section
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
    summary = summarize(cache.storage)
    parts = [*_overview(summary, reader), _history(cache)]
    teachers = []
    for name in reader.teachers:
        progress(f"maps of {name}")
        teachers.append(TeacherMaps(reader, name))
    parts.append(_samples(reader, teachers))
    parts += [_statistics(teacher) for teacher in teachers if teacher.levels]
    for teacher in teachers:
        progress(f"codecs on {teacher.name}")
        parts.append(_codecs(reader, teacher))
    progress("similarity")
    parts.append(_similarity(reader, teachers))
    return html.page(f"Teacher cache {cache.storage.url}", warnings(summary), parts)


def _overview(summary: Mapping[str, Any], reader: MapReader) -> list[Section]:
    head, columns = summary_facts(summary)
    fields = list(next(iter(columns.values()), {}))
    rows = [[field, *(str(column[field]) for column in columns.values())] for field in fields]
    known = html.paragraph(what_was_checked(summary))
    parts = [section("What it is", html.facts(head), html.table(["teacher", *columns], rows), known)]
    absent = [f"{name} is not shown below: {reason}" for name, reason in reader.absent.items()]
    if broken := [*summary["problems"], *absent]:
        parts.append(section("What is broken or missing", html.bullets(_cut(broken), "bad")))
    if quarantined := [quarantine_line(entry) for entry in summary["quarantined"]]:
        title, shown = f"Quarantined samples: {len(quarantined)}", html.bullets(_cut(quarantined))
        note = "These samples could not be decoded. Their rows hold nothing, and training leaves them out."
        parts.append(section(title, shown, note=note))
    return parts


def _history(cache: FeatureCache) -> Section:
    checked = check_shards(cache.manifest, cache.spec, Depth.RECORD)
    history = timeline(shard.record for shard in checked if shard.record is not None)
    if history is None:
        return section("How it was built", note="No commit record says when its shard was made.")
    begin, end = (
        datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
        for time in (history.start, history.end)
    )
    lanes = [
        (lane.worker, png_uri(heat(torch.from_numpy(lane.forward)[None], 0, 1))) for lane in history.lanes
    ]
    hidden = f" {history.hidden} more lanes are not shown." if history.hidden else ""
    return section(
        "How it was built",
        html.scale("0%", "100%", "share of a shard's time in the teachers' forward passes:"),
        html.timeline(lanes),
        note=f"From {begin} to {end}, {human_seconds(history.end - history.start)}. A line is "
        f"one of the shards that a worker (host and process) had in flight; grey is idle time.{hidden}",
    )


def _samples(reader: MapReader, teachers: Sequence[TeacherMaps]) -> Section:
    if not reader.rows:
        return section("What the teachers see", note="There is no row yet that every teacher can give.")
    return section(
        "What the teachers see",
        html.scale("low", "high", "token norms, of one range for each teacher and level:"),
        *(_sample(reader, row, teachers) for row in reader.rows),
        note="Left: the first three principal components of each level as red, green and blue, computed over "
        "all images below with every channel standardised: equal colours in one column are equal features. "
        f"Right: the norm of every token. {_levels_in_words(teachers)}",
    )


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


def _sample(reader: MapReader, row: int, teachers: Sequence[TeacherMaps]) -> Markup:
    cache = reader.cache
    sample, view, _ = (int(number) for number in cache.index.locate(row))
    key = cache.key(sample)
    try:
        photo = html.picture(jpeg_uri(reader.view(row)), f"{key}, view {view}", "photo")
    except (TeacherCacheError, OSError) as error:
        photo = html.placeholder(f"the image cannot be had: {in_a_line(error)}")
    num_levels = max(teacher.spec.num_levels for teacher in teachers)
    blocks = (range(num_levels)[first : first + _MAPS // 2] for first in range(0, num_levels, _MAPS // 2))
    maps = [_sample_maps(row, teachers, levels) for levels in blocks]
    return html.sample(html.figure(photo, f"{key} · row {row}, view {view}"), maps)


def _sample_maps(row: int, teachers: Sequence[TeacherMaps], levels: range) -> Markup:
    """Principal components and norms of some of the levels; a line for each teacher that has one of them."""
    numbers = [level + 1 for level in levels]
    titles = ("", *(f"PCA, {n}" for n in numbers), "", *(f"norm, {n}" for n in numbers))
    lines = [html.heading(title) for title in titles]
    for teacher in teachers:
        names = teacher.level_names[levels.start : levels.stop]
        if not names:
            continue
        lines.append(html.heading(teacher.name, "b"))
        for pictures, what in ((teacher.pictures, "PCA"), (teacher.norm_pictures, "token norms")):
            for level, name in zip(levels, names, strict=False):
                uri = pictures.get((row, level))
                shown = html.picture(uri, f"{teacher.name} {name}, {what}") if uri else None
                lines.append(shown or html.placeholder(teacher.damaged.get(row, "")))
            lines += [html.heading("")] * (len(levels) - len(names))
            if pictures is teacher.pictures:
                lines.append(html.heading(""))
    return html.map_grid(lines, ["74px", len(levels), "4px", len(levels)])


def _statistics(teacher: TeacherMaps) -> Section:
    named = dict(zip(teacher.level_names, teacher.levels, strict=True))
    norms = {name: level.norms_N.numpy() for name, level in named.items()}
    std = {name: level.std_C.numpy() for name, level in named.items()}
    rows = [(name, *_channel_facts(level)) for name, level in named.items()]
    header = ["", "mean norm", "dead channels", "with NaN or infinity", "outlier channels", "the loudest"]
    return section(
        f"Channels and norms of {teacher.name}",
        html.figure(norm_histogram(norms), f"{teacher.name}: norms of tokens"),
        html.figure(channel_curve(std), f"{teacher.name}: spread of channels"),
        html.table(header, rows),
        note=f"Over the {len(teacher.common_tokens)} rows shown above. A dead channel never changes; an "
        "outlier channel has more than ten times the energy of the median one.",
    )


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


def _codecs(reader: MapReader, teacher: TeacherMaps) -> Section:
    title = f"Codecs on {teacher.name}"
    rows = list(teacher.common_tokens)
    if not rows:
        return section(title, note="No row could be read.")
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
    drawn = (
        (
            html.figure(error_curve(curves), f"{teacher.name}: error of tokens"),
            html.figure(_error_maps(teacher, trials), "1 − cosine of every token of one image"),
            html.scale(number(_LEAST_ERROR), number(_LARGEST_ERROR), "1 − cosine, logarithmic:"),
        )
        if trials
        else ()
    )
    return section(
        title,
        html.table(
            ["codec", "a row", "token cosine", "1% are below", "relative L2", ""],
            (_trial_facts(name, trial) for name, trial in found.items()),
        ),
        *drawn,
        note=f"Against what is stored, which is {teacher.spec.codec}, of {len(tried)} rows. Tables are "
        "learnt from 2 others, those of a dct from 6 at most; cosine and L2 are taken after each channel is "
        "standardised, the maps and the curve of features as they are. NaN and infinity count as zero. "
        "Codecs with rings encode too slowly for this page: see `view`. What the stored codec itself lost "
        "is measured when a cache is built: see the first table.",
    )


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


def _error_maps(teacher: TeacherMaps, trials: Sequence[CodecTrial]) -> Markup:
    low, high = np.log10(_LEAST_ERROR), np.log10(_LARGEST_ERROR)
    grids = []
    for first in range(0, teacher.spec.num_levels, _MAPS):
        names = teacher.level_names[first : first + _MAPS]
        lines = [html.heading(text) for text in ("", *names)]
        for trial in trials:
            lines.append(html.heading(trial.codec, "b"))
            lines += [
                html.picture(
                    png_uri(heat(error_HW.clamp_min(1e-12).log10(), low, high)), f"{trial.codec}, {name}"
                )
                for name, error_HW in zip(names, trial.error_RSHW[0, first : first + _MAPS], strict=True)
            ]
        grids.append(html.map_grid(lines, ["110px", len(names)]))
    return Markup("").join(grids)


def _similarity(reader: MapReader, teachers: Sequence[TeacherMaps]) -> Section:
    title = "How alike the teachers are"
    rows = [row for row in reader.rows if all(row in teacher.common_tokens for teacher in teachers)]
    sets = {
        f"{teacher.name} level {level + 1}": torch.cat([teacher.common_tokens[row][level] for row in rows])
        for teacher in teachers
        for level in range(teacher.spec.num_levels)
        if rows
    }
    num_tokens = min((len(tokens) for tokens in sets.values()), default=0)
    if num_tokens < 4:
        return section(title, note="There are too few tokens to tell.")
    return section(
        title,
        html.matrix(list(sets), coloured(linear_cka(list(sets.values())).numpy())),
        note=f"Linear CKA (unbiased) of {num_tokens:,} tokens, taken at the same places of the images above. "
        "1: the same up to a rotation; 0: nothing in common.",
    )


def _cut(lines: Sequence[str]) -> list[str]:
    rest = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return [*lines[:_MAX_LISTED], *rest]


def _count(channels: Sequence[int]) -> str:
    if not channels:
        return "0"
    named = ", ".join(map(str, channels[:_MAX_LOUD]))
    return f"{len(channels)} ({named}{', …' if len(channels) > _MAX_LOUD else ''})"
