"""A plan and a cache as pages of terminal, one column a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.units import human_bytes, human_hours, human_number, human_seconds

if TYPE_CHECKING:  # they bring torch, which `inspect` has no time for
    from teachercache.cache_builder.budget import Option
    from teachercache.cache_builder.plan import Plan
    from teachercache.pipeline.records.spec import CacheSpec, GridSpec
    from teachercache.student.datasets import Finding
    from teachercache.student.similarity import Similarity

_SHOWN = 8
_IMAGES = {
    "reference": "read from there in training",
    "copy": "copied into the cache",
    "rendered": "whose pixels are in the cache",
}


def plan_table(plan: Plan) -> RenderableType:
    """What a build will cost, beside teachers that run in every training."""
    from teachercache.cache_builder.build_recipe import GPUS
    from teachercache.cache_builder.plan import advice, break_even

    spec, prices, cost, rates = plan.spec, plan.prices, break_even(plan), plan.rates
    origin = "stated" if prices.teacher_tflops_per_gpu else f"{prices.gpu}, {GPUS[prices.gpu].origin}"
    how = f"at {prices.tflops:g} TFLOP/s sustained by a GPU ({origin})"
    if rates.device:
        how = f"measured on {rates.device}, which decodes {human_number(1 / rates.decode_s)} img/s"
    columns = {
        teacher.name: {
            **_teacher_facts(teacher.spec.model_dump(mode="json")),
            "bytes per view": human_bytes(teacher.bytes_per_row),
            "GMACs per view": f"{teacher.gmacs:,.1f}",
            f"img/s of a {rates.machine}": human_number(1 / forward_s)
            if (forward_s := rates.forward_s[teacher.name])
            else "in the pass of another",
            "shards to do": f"{teacher.missing_shards:,} of {spec.num_shards:,}",
        }
        for teacher in plan.teachers
    }
    free = "no limit known" if plan.free_bytes is None else f"{human_bytes(plan.free_bytes)} free"
    gmacs = sum(teacher.gmacs for teacher in plan.teachers)
    amount, unit = human_hours(plan.gpu_hours)
    online, online_unit = human_hours(cost.online_gpu_hours, digits=4)
    most = min(plan.limits.values())
    totals = {
        "cache": plan.url,
        "images": f"{spec.dataset.num_samples:,} from {spec.dataset.kind} {spec.dataset.location}",
        "views": _views(spec.views),
        "rows": f"{spec.num_rows:,} in {spec.num_shards:,} shards of {spec.rows_per_shard} for each teacher",
        "files": f"{plan.num_files:,}",
        "bytes": f"{human_bytes(plan.total_bytes)} ({human_bytes(plan.read_bytes_per_row)} a view)"
        + (f", before {spec.compressor}" if spec.compressor else ""),
        "to write": f"{human_bytes(plan.missing_bytes)} ({free})",
        "teachers": f"{gmacs:,.1f} GMACs a view, {human_bytes(2e9 * gmacs * spec.num_rows, 'FLOP')} in all",
        f"{rates.machine}-{unit}": f"{amount} {how}",
        "building": f"writes {human_bytes(prices.gpus * most * plan.read_bytes_per_row)}/s on "
        f"{prices.gpus} {rates.machine}s of {human_number(most)} views/s each",
        "at most": f"{', '.join(f'{human_number(rate)} by {what}' for what, rate in plan.limits.items())} "
        f"views/s of a {rates.machine}: bound by {min(plan.limits, key=plan.limits.__getitem__)}",
        "training": f"reads {human_bytes(prices.student_images_per_s * plan.read_bytes_per_row)}/s at "
        f"{prices.student_images_per_s:g} img/s",
        "pixels": pixels_line(
            spec, plan.pixel_bytes, prices.student_images_per_s / prices.gpus, prices.render_ms
        ),
        "online": f"${cost.online:,.2f} for teachers, {online} {rates.machine}-{online_unit} a run: "
        f"{prices.runs} × {prices.epochs:g} epochs",
        "cached": f"${cost.cached:,.2f}: ${cost.build:,.2f} to build, ${cost.keep:,.2f} to keep, "
        f"${cost.read:,.2f} to read",
        "prices": f"${3600 * prices.gpu_usd_per_s:g} a {rates.machine}-hour, "
        f"${prices.usd_per_tb_month:g} a TB-month × {prices.months:g}, "
        f"${prices.usd_per_million_requests:g} a million requests, {prices.storage_gb_per_s:g} GB/s",
        "advice": cost.verdict,
    }
    return Group(columns_table("teacher", columns), lines(totals | advice(plan)))


def pixels_line(spec: CacheSpec, pixel_bytes: int, images_per_s: float, render_ms: float) -> str:
    """What training's pixels cost each GPU, by both ways: cores that decode, or bytes that are read."""
    in_all = f", {human_bytes(spec.num_rows * pixel_bytes)} in all" if spec.num_rows else ""
    nbytes = f"{human_bytes(pixel_bytes)} a view{in_all}"
    cores = f"{images_per_s * render_ms / 1000:.1f} cores a GPU that decode, at {render_ms:g} ms a view"
    rate = f"for {images_per_s:,.0f} img/s"
    if spec.images == "rendered":
        return f"read from the cache, {nbytes}; images: reference takes {cores} {rate}"
    return f"{cores} {rate}; images: rendered takes none, but {nbytes}"


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """What a cache holds (`summarize`), and what is wrong with it."""
    head, columns = summary_facts(summary)
    notes, broken, problems = warnings(summary), [], summary["problems"]
    if quarantined := summary["quarantined"]:
        notes += ["Quarantined:", *_some([quarantine_line(entry) for entry in quarantined])]
    if problems:
        things = "thing is" if len(problems) == 1 else "things are"
        advice = "`teachercache verify` checks every shard and says how to mend it."
        broken = [f"{len(problems)} {things} broken:", *_some(problems), advice]
    told = {"yellow": notes, "red": broken, "dim": [what_was_checked(summary)]}
    texts = (Text(line, style=style) for style, said in told.items() for line in said)
    return Group(lines(head), columns_table("teacher", columns), *texts)


def details_table(details: Mapping[str, Any]) -> RenderableType:
    """A shard or a row (`details.py`), a column for each teacher; or a sample, a line for each row."""
    facts = dict(details)
    teachers = facts.pop("teachers", None)
    rows = None if teachers else facts.pop("rows", None)
    shown: list[RenderableType] = [lines({name: _said(value) for name, value in facts.items()})]
    if teachers:
        fields = dict.fromkeys(field for state in teachers.values() for field in state)
        columns = {
            name: {field: _coloured(_said(state[field])) if field in state else "" for field in fields}
            for name, state in teachers.items()
        }
        shown.append(columns_table("", columns))
    if rows:
        table = _table("row", "view_index", "shard", *rows[0]["teachers"])
        for row in rows:
            cells = row["row"], row["view_index"], row["shard"], *row["teachers"].values()
            table.add_row(*(_coloured(str(cell)) for cell in cells))
        shown.append(table)
    return Group(*shown)


def _said(value: Any) -> str:
    """Plain data in words: what has parts with parts of their own takes a line for each."""
    if isinstance(value, Mapping):
        parts, inner = [f"{name} {_said(part)}" for name, part in value.items()], list(value.values())
    elif isinstance(value, list):
        parts, inner = [_said(part) for part in value], value
    else:
        is_bool = isinstance(value, bool)
        said = f"{value:.6g}" if isinstance(value, float) else str(value).lower() if is_bool else str(value)
        return "–" if value in (None, "") else said
    return ("\n" if any(isinstance(part, Mapping) for part in inner) else ", ").join(parts) or "–"


def _coloured(state: str) -> Text:
    text = Text(state)
    text.highlight_regex(r"^(committed|sound)$", "green")
    text.highlight_regex(r"^not committed$", "yellow")
    text.highlight_regex(r"^broken: .*", "red")
    return text


def summary_facts(
    summary: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, dict[str, str | Text]]]:
    """What a cache is, and what there is to say of each teacher."""
    dataset, versions = summary["dataset"], summary["versions"]
    images = _IMAGES[summary["images"]]
    teachers = summary["teachers"]
    row_nbytes = sum(teacher["bytes_per_row"] or 0 for teacher in teachers.values())
    nbytes = sum(teacher["nbytes"] for teacher in teachers.values())
    so_far = in_all = ""
    if not _complete(summary):
        so_far, in_all = " so far", f", {human_bytes(row_nbytes * summary['rows'])} when complete"
    head = {
        "cache": f"{summary['url']} (id {summary['cache_id'][:12]})",
        "created": f"{summary['created']} with "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "pillow") if name in versions),
        "images": f"{dataset['num_samples']:,} from {dataset['kind']} {dataset['location']}, {images}",
        "fingerprint": dataset["fingerprint"],
        "views": _views(ViewPolicy.model_validate(summary["views"])),
        "rows": f"{summary['rows']:,} in {summary['shards']:,} shards of {summary['rows_per_shard']}",
        "bytes": f"{human_bytes(nbytes)}{so_far}, {human_bytes(row_nbytes)} a row{in_all}",
    }
    columns = {
        name: _stored_facts(teacher, summary["committed"][name], summary["planned"][name])
        for name, teacher in teachers.items()
    }
    return head, columns


def _stored_facts(teacher: Mapping[str, Any], done: int, planned: int) -> dict[str, str | Text]:
    fidelity, seconds = teacher["fidelity"], teacher["seconds"]
    cosine = "{cosine_mean:.5f}, 1% below {cosine_p1:.5f}".format(**fidelity) if fidelity else "not measured"
    speed = forward = "–"
    if teacher["rows_per_s"]:
        speed = f"{human_number(teacher['rows_per_s'])} rows/s for {human_seconds(teacher['busy_s'])}"
    if seconds.get("wall"):
        forward = f"{min(seconds.get('forward', 0.0) / seconds['wall'], 1):.0%} of the shards' time"
    hosts = [host for host in teacher["hosts"] if host]
    more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
    return {
        **_teacher_facts(teacher),
        "token cosine": cosine,
        "weights hash": (teacher["weights_hash"] or "")[:12],
        "shards": Text(f"{done:,} of {planned:,}", style="green" if done == planned else "yellow"),
        "rows": f"{teacher['rows_committed']:,} ({teacher['rows_invalid']:,} invalid)",
        "bytes per row": human_bytes(teacher["bytes_per_row"]) if teacher["bytes_per_row"] else "unknown",
        "bytes": human_bytes(teacher["nbytes"]),
        "speed": speed,
        "forward": forward,
        "hosts": ", ".join(hosts[:3]) + more or "–",
        "last commit": (teacher["last_commit"] or "–")[:16].replace("T", " "),
    }


def similarity_table(similarities: Mapping[str, Similarity]) -> RenderableType:
    """Representation similarity by level; a teacher of fewer levels stands beside the last."""
    levels = max(len(similarity.levels) for similarity in similarities.values())
    columns = {}
    for name, similarity in similarities.items():
        cells = [""] * (levels - len(similarity.levels)) + [f"{cosine:.4f}" for cosine in similarity.levels]
        by_level = {f"level {level}": cell for level, cell in enumerate(cells, start=1)}
        columns[name] = by_level | {"mean": f"{similarity.mean:.4f}"}
    return columns_table("cosine similarity", columns)


def options_table(options: Mapping[str, Sequence[Option]], num_rows: int) -> RenderableType:
    """Codecs of each teacher by grid: what the grid costs, bytes, what the calibration sample loses.

    Cosines of tokens are means and 1st percentiles, of standardised features and of raw ones.
    """
    from teachercache.cache_builder.budget import GRID_COSTS

    by_grid: dict[tuple[str, GridSpec], list[Option]] = {}
    for name, available in options.items():
        for option in available:
            by_grid.setdefault((name, option.spec.grid), []).append(option)
    tables: list[RenderableType] = []
    for (name, grid), available in by_grid.items():
        spec = available[0].spec
        costs = GRID_COSTS[grid.kind]
        if (kept := available[0].grid_cosine) < 1:
            costs += f"; its tokens' mean cosine is {kept:.4f} before any codec"
        title = f"{name}, {grid.kind} grid {_times(spec.stored_grid)} × {spec.width}: {costs}"
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
        )
        table.add_column("codec", no_wrap=True)
        for column in ("a view", "all views", "of f16", "cosine, 1%", "raw, 1%", "rel. L2"):
            table.add_column(column, justify="right", no_wrap=True)
        for option in available:
            fidelity = option.fidelity
            table.add_row(
                option.spec.codec,
                human_bytes(option.bytes_per_row),
                human_bytes(num_rows * option.bytes_per_row),
                f"{fidelity.float16_ratio:.3f}",
                _cosines(fidelity.cosine_mean, fidelity.cosine_p1),
                _cosines(fidelity.raw_cosine_mean, fidelity.raw_cosine_p1),
                f"{fidelity.relative_l2:.4f}",
            )
        tables += table, ""
    return Group(*tables)


def _cosines(mean: float, p1: float) -> str:
    """Rounded down: 1.0000 is nothing lost."""
    return ", ".join(f"{math.floor(1e4 * cosine) / 1e4:.4f}".removeprefix("0") for cosine in (mean, p1))


def findings_table(findings: Sequence[Finding]) -> RenderableType:
    """What each split of a data set has of each kind of file."""
    table = _table("split", "files", "found", "expected", "missing")
    for finding in findings:
        missing = ", ".join(finding.missing)
        if finding.expected - finding.found > len(finding.missing) > 0:
            missing += ", …"
        style = "red" if finding.found < finding.expected else ""
        counts = f"{finding.found:,}", f"{finding.expected:,}"
        table.add_row(finding.split, finding.what, *counts, missing, style=style)
    return table


def _teacher_facts(teacher: Mapping[str, Any]) -> dict[str, str]:
    grid = teacher["grid"]["size"] or teacher["native_grid"]
    return {
        "model": teacher["model"],
        "weights": "pretrained" if teacher["pretrained"] else f"random (seed {teacher['random_seed']})",
        "input": f"{_times(teacher['image_size'])} {teacher['precision']}",
        "block_indices": ", ".join(map(str, teacher["block_indices"])),
        "grid": f"{_times(grid)} {teacher['grid']['kind']}",
        "width": str(teacher["width"]),
        "codec": teacher["codec"],
    }


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    warnings = []
    random = [name for name, teacher in summary["teachers"].items() if not teacher["pretrained"]]
    if random:
        warnings.append(f"Random weights, for tests and timing only: {', '.join(random)}.")
    if not _complete(summary):
        warnings.append("Not complete: run the same build command again to continue.")
    if count := len(summary["quarantined"]):
        warnings.append(f"{count} {'sample is' if count == 1 else 'samples are'} quarantined.")
    return warnings


def what_was_checked(summary: Mapping[str, Any]) -> str:
    """How far the absence of problems can be trusted."""
    state = "were compared" if summary["problems"] else "agree"
    return f"Records and file sizes {state}; every byte is compared by `teachercache verify CACHE --full`."


def _complete(summary: Mapping[str, Any]) -> bool:
    return all(done >= summary["planned"][name] for name, done in summary["committed"].items())


def quarantine_line(entry: Mapping[str, Any]) -> str:
    return f"{entry['key']} ({entry['location']}): {entry['reason']}"


def _some(entries: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in cut(entries, _SHOWN, "; --json lists all")]


def cut(entries: Sequence[str], most: int, rest: str = "") -> list[str]:
    """The first of these, and how many more there are."""
    more = [f"and {len(entries) - most} more{rest}"] if len(entries) > most else []
    return [*entries[:most], *more]


def _table(*titles: str) -> Table:
    return Table(*(Column(title, overflow="fold") for title in titles), box=box.SIMPLE_HEAD)


def columns_table(corner: str, columns: Mapping[str, Mapping[str, str | Text]]) -> Table:
    table = _table(corner, *columns)
    for field in next(iter(columns.values())):
        table.add_row(Text(field, style="bold"), *(column[field] for column in columns.values()))
    return table


def lines(values: Mapping[str, str]) -> RenderableType:
    """One line each and no table, which would break long paths."""
    width = max(map(len, values), default=0)
    return Group(*(Text.assemble((name.ljust(width), "bold"), "  ", value) for name, value in values.items()))


def _views(policy: ViewPolicy) -> str:
    facts = f"{policy.num_views} of {policy.policy} at {_times(policy.size)}, seed {policy.seed}"
    if policy.margin:
        facts += f", {policy.windows_per_axis**2} windows of each, stored at {_times(policy.stored_size)}"
    return facts + (", in pairs of flips" if policy.flip == "pairs" else "")


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
