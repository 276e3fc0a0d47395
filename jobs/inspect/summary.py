"""What is in a cache, as data and as a page of terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_builder.plan import bytes_per_row, human_bytes
from cache_builder.stages import STAGES
from cache_builder.verify import teachers_and_images
from pipeline.cache import FeatureCache

_SHOWN_QUARANTINED = 8


def summarize(cache: FeatureCache) -> dict[str, Any]:
    """Everything that `inspect` shows, as plain data; works on a half-built cache."""
    spec = cache.spec
    return {
        "url": cache.storage.url,
        "cache_id": spec.cache_id,
        "created": spec.created,
        "versions": spec.versions,
        "dataset": spec.dataset.model_dump(mode="json"),
        "views": spec.views.model_dump(mode="json"),
        "rows": spec.num_rows,
        "shards": spec.num_shards,
        "rows_per_shard": spec.rows_per_shard,
        "images": spec.images,
        "teachers": {name: _teacher(cache, name) for name in cache.teachers},
        "committed": {name: len(cache.manifest.committed(name)) for name in teachers_and_images(cache)},
        "quarantined": [entry.model_dump(mode="json") for entry in cache.manifest.quarantine()],
    }


def _teacher(cache: FeatureCache, name: str) -> dict[str, Any]:
    teacher = cache.spec.teachers[name]
    records = cache.commits(name).values()
    seconds = {
        stage: sum(record.seconds.get(stage, 0.0) for record in records) for stage in (*STAGES, "wall")
    }
    return teacher.model_dump(mode="json") | {
        "stored_grid": teacher.stored_grid,
        "bytes_per_row": bytes_per_row(teacher),
        "nbytes": sum(record.nbytes for record in records),
        "rows_committed": sum(record.num_rows for record in records),
        "rows_invalid": sum(len(record.invalid_rows) for record in records),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "hosts": sorted({record.host for record in records}),
        "last_commit": max((record.finished for record in records), default=None),
    }


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """The page: what it is, one line a teacher, and what is wrong."""
    dataset, views = summary["dataset"], summary["views"]
    head = Table.grid(padding=(0, 2))
    for name, value in (
        ("cache", f"{summary['url']}  id {summary['cache_id'][:12]}"),
        ("created", f"{summary['created']}, " + _versions(summary["versions"])),
        ("images", f"{dataset['num_samples']:,} from {dataset['kind']} {dataset['location']}"),
        ("", f"fingerprint {dataset['fingerprint'][:12]}, {_images(summary['images'])}"),
        (
            "views",
            f"{views['num_views']} of {views['policy']} at {_times(views['size'])}, seed {views['seed']}",
        ),
        ("rows", f"{summary['rows']:,} in {summary['shards']:,} shards of {summary['rows_per_shard']}"),
    ):
        head.add_row(Text(name, style="bold"), value)
    table = Table()
    for column in ("teacher", "model", "weights", "input", "blocks", "grid × width", "codec"):
        table.add_column(column)
    for column in ("committed", "invalid", "bytes/row", "bytes", "img/s of one process"):
        table.add_column(column, justify="right")
    for name, teacher in summary["teachers"].items():
        done, planned = summary["committed"][name], summary["shards"]
        wall = teacher["seconds"]["wall"]
        table.add_row(
            name,
            teacher["model"],
            _weights(teacher),
            _times(teacher["image_size"]),
            " ".join(map(str, teacher["block_indices"])),
            f"{teacher['grid']['kind']} {_times(teacher['stored_grid'])} × {teacher['width']}",
            teacher["codec"],
            Text(f"{done}/{planned} shards", style="green" if done == planned else "yellow"),
            f"{teacher['rows_invalid']}",
            human_bytes(teacher["bytes_per_row"]),
            human_bytes(teacher["nbytes"]),
            f"{teacher['rows_committed'] / wall:.2f}" if wall else "–",
        )
    return Group(head, table, *_warnings(summary))


def _warnings(summary: Mapping[str, Any]) -> list[Text]:
    lines = []
    random = [name for name, teacher in summary["teachers"].items() if not teacher["pretrained"]]
    if random:
        lines.append(Text(f"Random weights, for tests and timing only: {', '.join(random)}", style="yellow"))
    if any(done < summary["shards"] for done in summary["committed"].values()):
        lines.append(Text("Not complete: run the same build command again to continue.", style="yellow"))
    quarantined = summary["quarantined"]
    if quarantined:
        lines.append(Text(f"{len(quarantined)} samples are quarantined:", style="yellow"))
        lines += [
            Text(f"  {entry['key']} ({entry['location']}): {entry['reason']}")
            for entry in quarantined[:_SHOWN_QUARANTINED]
        ]
        if len(quarantined) > _SHOWN_QUARANTINED:
            lines.append(Text(f"  and {len(quarantined) - _SHOWN_QUARANTINED} more in quarantine/"))
    return lines


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _weights(teacher: Mapping[str, Any]) -> str:
    kind = "pretrained" if teacher["pretrained"] else f"random, seed {teacher['random_seed']}"
    return f"{kind} {(teacher['weights_hash'] or '')[:8]}"


def _images(kind: str) -> str:
    return "copied into the cache" if kind == "copy" else "read from there in training"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "pillow") if name in versions)
