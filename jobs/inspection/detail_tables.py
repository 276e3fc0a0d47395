"""One shard, one row or one sample as pages of terminal (`details.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from teachercache.jobs.inspection.tables import columns_table, lines, problem_lines, quarantine_line
from teachercache.pipeline.units import human_bytes

_GOOD = ("committed", "sound")
_ABSENT = "not committed"


def shard_table(details: Mapping[str, Any]) -> RenderableType:
    first, last = details["rows"]
    head = {
        "shard": str(details["shard"]),
        "rows": f"{first:,} … {last:,}",
        "samples": f"{details['samples'][0]:,} … {details['samples'][1]:,}, {details['views']} views each",
    }
    columns = {name: _shard_facts(shard) for name, shard in details["teachers"].items()}
    quarantined = [Text(quarantine_line(entry), style="yellow") for entry in details["quarantined"]]
    return Group(
        lines(head), columns_table("teacher", columns), *quarantined, *problem_lines(details["problems"])
    )


def row_table(details: Mapping[str, Any]) -> RenderableType:
    head = {
        "row": f"{details['row']:,}: place {details['place']} of shard {details['shard']}",
        **_sample_facts(details["sample"]),
        "view": f"{details['view_index']}: {_view(details['view'])}",
    }
    columns = {name: _row_facts(row) for name, row in details["teachers"].items()}
    return Group(lines(head), columns_table("teacher", columns), *problem_lines(details["problems"]))


def sample_table(details: Mapping[str, Any]) -> RenderableType:
    quarantined = {"quarantined": details["quarantined"]} if details["quarantined"] else {}
    rows: dict[str, dict[str, str | Text]] = {
        f"view {row['view_index']}": {
            "row": f"{row['row']:,}",
            "shard": str(row["shard"]),
            **{name: _state(state) for name, state in row["teachers"].items()},
        }
        for row in details["rows"]
    }
    return Group(
        lines(_sample_facts(details["sample"]) | quarantined),
        columns_table("sample", rows),
        *problem_lines(details["problems"]),
    )


def _shard_facts(shard: Mapping[str, Any]) -> dict[str, str | Text]:
    record = {} if "files" not in shard else shard
    seconds = record.get("seconds", {})
    versions = record.get("versions", {})
    return {
        "state": _state(shard["state"]),
        "finished": record.get("finished") or "–",
        "host": record.get("host") or "–",
        "bytes": human_bytes(record["nbytes"]) if record else "–",
        "files": "\n".join(
            f"{name}\n  xxh3 {file['checksum']}" for name, file in record.get("files", {}).items()
        )
        or "–",
        "invalid rows": ", ".join(map(str, record.get("invalid_rows", ()))) or "none",
        "channels' spread\nmin median max": _channels(record.get("channels")),
        "seconds": ", ".join(f"{stage} {value:.3g}" for stage, value in seconds.items()) or "–",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)
        or "–",
        "content id": record.get("content_id", "–"),
    }


def _channels(levels: list[dict[str, float]] | str | None) -> str | Text:
    if isinstance(levels, str):
        return Text(levels, style="red")
    return "\n".join(_spread(level) for level in levels or ()) or "–"


def _spread(level: Mapping[str, float]) -> str:
    values = " ".join(f"{level[name]:.3g}" for name in ("spread_min", "spread_median", "spread_max"))
    return values + (f", {level['dead']} dead" if level["dead"] else "")


def _row_facts(row: Mapping[str, Any]) -> dict[str, str | Text]:
    arrays = "\n".join(
        f"{name} {array['dtype']} {'×'.join(map(str, array['shape']))}, {human_bytes(array['nbytes'])}"
        for name, array in row.get("arrays", {}).items()
    )
    return {
        "state": _state(row["state"]),
        "arrays": arrays or "–",
        "token norms\nmin mean max": "\n".join(map(_norms, row.get("token_norms") or ())) or "–",
    }


def _norms(level: Mapping[str, float | None]) -> str:
    values = " ".join("–" if level[name] is None else f"{level[name]:.3g}" for name in ("min", "mean", "max"))
    return values + (f", {level['not_finite']:,} values not finite" if level["not_finite"] else "")


def _state(state: str) -> Text:
    style = "green" if state in _GOOD else "yellow" if state == _ABSENT else "red"
    return Text(state, style=style)


def _sample_facts(sample: Mapping[str, Any]) -> dict[str, str]:
    if "key" not in sample:
        return {"sample": str(sample["sample_index"])}
    place = f"{sample['path']} at {sample['offset']}" if sample["offset"] else sample["path"]
    return {
        "sample": f"{sample['key']} (number {sample['sample_index']:,}"
        + (f", label {sample['label']})" if sample["label"] else ")"),
        "image": f"{place}, {sample['height']}×{sample['width']} pixels, {human_bytes(sample['nbytes'])}, "
        f"status {sample['status']}",
    }


def _view(view: Mapping[str, Any]) -> str:
    if not view:
        return "unknown"
    box = f"x {view['left']:g}…{view['right']:g}, y {view['top']:g}…{view['bottom']:g}"
    return f"{box}{', mirrored' if view['flip'] else ''}, rendered at {view['height']}×{view['width']}"
