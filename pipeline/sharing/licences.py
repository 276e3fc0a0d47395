"""Lineage of licences: those of the teachers' weights bind what was made by them, caches and students."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from teachercache.pipeline.errors import LicenceError
from teachercache.pipeline.records.spec import TeacherSpec

UNKNOWN, RANDOM, UNSTATED = "unknown", "random weights", "not stated"
LINEAGE = "teacher_licences"  # the key of a card's header: licences by teacher


@cache
def _known() -> Any:
    return yaml.safe_load(Path(__file__).with_name("licences.yaml").read_text())


def licence_of(teacher: TeacherSpec) -> str:
    """That of a teacher's weights, as licences.yaml calls it; `UNKNOWN` for those of a file, but for models
    whose known weights are restricted: a file may well hold these."""
    found = (licence for name, licence in _known()["models"].items() if fnmatchcase(teacher.model, name))
    name = next(found, UNKNOWN)
    if teacher.checkpoint:
        return name if "restricted" in _known()["licences"][name] else UNKNOWN
    return name if teacher.pretrained else RANDOM


def card_header(licences: Mapping[str, str]) -> str:
    """What a card's header says: the licence that all teachers share, and who has which."""
    distinct = {*licences.values()} - {RANDOM} or {UNKNOWN}
    name = UNKNOWN if distinct & {UNKNOWN, UNSTATED} else "-and-".join(sorted(distinct))
    on_the_hub = name == UNKNOWN or (len(distinct) == 1 and not name.endswith("-license"))
    told = {"license": name} if on_the_hub else {"license": "other", "license_name": name}
    return yaml.safe_dump({**told, LINEAGE: dict(licences)}, sort_keys=False)


def licence_rows(licences: Mapping[str, str]) -> str:
    """A card's table: each teacher, its licence and the terms."""
    known = _known()["licences"]
    rows = [
        f"| {teacher} | [{name}]({known[name]['url']}) | {known[name]['terms']} |"
        for teacher, name in licences.items()
    ]
    return "\n".join(rows) or "| none | | |"


def require_shareable(licences: Mapping[str, str], copied_images: int = 0) -> None:
    """Raises `LicenceError` for what may not simply be public: nobody here knows whose the images are."""
    reasons = [f"copies of {copied_images:,} images, whose licence is not known here"] * bool(copied_images)
    for teacher, name in licences.items():
        licence = _known()["licences"].get(name, {})
        if "restricted" in licence:
            reasons.append(f"{teacher} is under {name}: {licence['terms']} ({licence['url']})")
    if reasons:
        raise LicenceError(
            "Licences restrict who may have this.",
            got="; ".join(reasons),
            do="push it with --private, or without these teachers; where you may share it and have done what "
            "the terms ask, add --accept-licences",
        )
