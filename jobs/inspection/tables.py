"""A plan and a cache as pages of terminal, one column a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_builder.budget import Option
from cache_builder.plan import Plan, human_bytes
from student.repsim import Similarity

_SHOWN_QUARANTINED = 8


def plan_table(plan: Plan) -> RenderableType:
    """What a build will cost."""
    spec = plan.spec
    columns = {
        teacher.name: {
            **_teacher_facts(teacher.spec.model_dump(mode="json")),
            "bytes per view": human_bytes(teacher.bytes_per_row),
            "GMACs per view": f"{teacher.gmacs:,.1f}",
            "shards to do": f"{teacher.missing_shards:,} of {spec.num_shards:,}",
        }
        for teacher in plan.teachers
    }
    free = "no limit known" if plan.free_bytes is None else f"{human_bytes(plan.free_bytes)} free"
    gmacs = sum(teacher.gmacs for teacher in plan.teachers)
    totals = {
        "cache": plan.url,
        "images": f"{spec.dataset.num_samples:,} from {spec.dataset.kind} {spec.dataset.location}",
        "views": _views(spec.views.model_dump(mode="json")),
        "rows": f"{spec.num_rows:,} in {spec.num_shards:,} shards of {spec.rows_per_shard} for each teacher",
        "files": f"{plan.num_files:,}",
        "bytes": f"{human_bytes(plan.total_bytes)} ({human_bytes(plan.bytes_per_row)} a view)",
        "to write": f"{human_bytes(plan.missing_bytes)} ({free})",
        "teachers": f"{gmacs:,.1f} GMACs a view, {2e-6 * gmacs * spec.num_rows:,.3g} PFLOP in all",
        "GPU-hours": f"{plan.gpu_hours:,.2f} at {plan.tflops_per_gpu:g} TFLOP/s sustained by a GPU "
        "(plan.teacher_tflops_per_gpu)",
        "training": f"reads {human_bytes(round(plan.read_bytes_per_s))}/s at {plan.student_images_per_s:g} "
        "img/s (plan.student_images_per_s)",
    }
    return Group(_columns("teacher", columns), _lines(totals))


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """What a cache holds (`summarize`), and what is wrong with it."""
    dataset, versions = summary["dataset"], summary["versions"]
    images = "copied into the cache" if summary["images"] == "copy" else "read from there in training"
    head = {
        "cache": f"{summary['url']} (id {summary['cache_id'][:12]})",
        "created": f"{summary['created']} with "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "pillow") if name in versions),
        "images": f"{dataset['num_samples']:,} from {dataset['kind']} {dataset['location']}, {images}",
        "fingerprint": dataset["fingerprint"],
        "views": _views(summary["views"]),
        "rows": f"{summary['rows']:,} in {summary['shards']:,} shards of {summary['rows_per_shard']}",
    }
    columns = {
        name: {
            **_teacher_facts(teacher),
            "weights hash": (teacher["weights_hash"] or "")[:12],
            "shards": _done(summary["committed"][name], summary["shards"]),
            "rows": f"{teacher['rows_committed']:,} ({teacher['rows_invalid']:,} invalid)",
            "bytes per row": human_bytes(teacher["bytes_per_row"]),
            "bytes": human_bytes(teacher["nbytes"]),
            "forward": f"{teacher['seconds']['forward']:.1f} of {teacher['seconds']['wall']:.1f} s",
            "last commit": teacher["last_commit"] or "–",
        }
        for name, teacher in summary["teachers"].items()
    }
    return Group(_lines(head), _columns("teacher", columns), *_warnings(summary))


def similarity_table(similarities: Mapping[str, Similarity]) -> RenderableType:
    """Representation similarity, by level."""
    levels = max(len(similarity.levels) for similarity in similarities.values())
    columns = {
        name: {f"level {level}": f"{similarity.levels[level]:.4f}" for level in range(levels)}
        | {"mean": f"{similarity.mean:.4f}"}
        for name, similarity in similarities.items()
    }
    return _columns("cosine similarity", columns)


def options_table(options: Mapping[str, Sequence[Option]], num_rows: int) -> RenderableType:
    """Grids and codecs of each teacher: bytes, and what they lose on the calibration sample."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("teacher", "grid", "codec"):
        table.add_column(column)
    for column in ("bytes/view", "all views", "of float16", "token cosine", "1st percentile", "relative L2"):
        table.add_column(column, justify="right")
    for name, available in options.items():
        for option in available:
            spec, fidelity = option.spec, option.fidelity
            table.add_row(
                name,
                f"{spec.grid.kind} {_times(spec.stored_grid)}",
                spec.codec,
                human_bytes(option.bytes_per_row),
                human_bytes(num_rows * option.bytes_per_row),
                f"{fidelity.float16_ratio:.3f}",
                f"{fidelity.cosine_mean:.5f}",
                f"{fidelity.cosine_p1:.5f}",
                f"{fidelity.relative_l2:.4f}",
            )
    return table


def _teacher_facts(teacher: Mapping[str, Any]) -> dict[str, str]:
    grid = teacher["grid"]["size"] or teacher["native_grid"]
    return {
        "model": teacher["model"],
        "weights": "pretrained" if teacher["pretrained"] else f"random (seed {teacher['random_seed']})",
        "input": f"{_times(teacher['image_size'])} {teacher['precision']}",
        "blocks": ", ".join(str(index + 1) for index in teacher["block_indices"]),
        "grid": f"{_times(grid)} {teacher['grid']['kind']}",
        "width": str(teacher["width"]),
        "codec": teacher["codec"],
    }


def _warnings(summary: Mapping[str, Any]) -> list[Text]:
    lines = []
    random = [name for name, teacher in summary["teachers"].items() if not teacher["pretrained"]]
    if random:
        lines.append(f"Random weights, for tests and timing only: {', '.join(random)}.")
    if any(done < summary["shards"] for done in summary["committed"].values()):
        lines.append("Not complete: run the same build command again to continue.")
    quarantined = summary["quarantined"]
    if quarantined:
        lines.append(f"{len(quarantined)} samples are quarantined:")
        shown = quarantined[:_SHOWN_QUARANTINED]
        lines += [f"  {entry['key']} ({entry['location']}): {entry['reason']}" for entry in shown]
        if len(quarantined) > len(shown):
            lines.append(f"  and {len(quarantined) - len(shown)} more in {summary['url']}/quarantine")
    return [Text(line, style="yellow") for line in lines]


def _columns(corner: str, columns: Mapping[str, Mapping[str, str | Text]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for title in (corner, *columns):
        table.add_column(title, overflow="fold")
    for field in next(iter(columns.values())):
        table.add_row(Text(field, style="bold"), *(column[field] for column in columns.values()))
    return table


def _lines(values: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return grid


def _done(done: int, planned: int) -> Text:
    return Text(f"{done:,} of {planned:,}", style="green" if done == planned else "yellow")


def _views(views: Mapping[str, Any]) -> str:
    return f"{views['num_views']} of {views['policy']} at {_times(views['size'])}, seed {views['seed']}"


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
