"""WebDataset tars, such as those of `timm/imagenet-1k-wds`: `key.jpg` with `key.cls` or `key.json`."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from posixpath import splitext
from typing import IO, NamedTuple

from teachercache.pipeline.sources.keys import printable
from teachercache.pipeline.sources.source import (
    IMAGE_SUFFIXES,
    PHOTO_SUFFIXES,
    SampleRows,
    Scanned,
    file_kind,
    is_image_name,
)
from teachercache.pipeline.sources.tar import TarMember, TarSource, read_range, tar_members

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_LONGEST_LABEL_BYTES = 1 << 20


class _Field(NamedTuple):
    key: str
    name: str
    member: TarMember


class WebDatasetSource(TarSource):
    """A tar, or the tars of a folder or pattern. Members are read by byte range, never extracted.

    As in webdataset, a member's key ends and its field begins at the first dot of its base name, and the
    members of one sample are adjacent: next to `a.jpg`, `a.seg.png` is the field `seg.png` of sample `a`,
    and so is a `tif` next to a `jpg`. Members such as `a.1.jpg` are images, named without suffix, only in a
    sample without a plain image field.
    The label is the text of `cls`, or else `label` in `json`: from the member with the image's name and
    another suffix, anywhere in the tar, or else from the sample. A key that occurs in several tars becomes
    `<tar without suffix>/<key>` in each; within one tar, the first sample keeps that key, and later
    ones get the status "duplicate key" under `<tar without suffix>/<key>#<offset>`.
    """

    kind = "webdataset"

    def units(self) -> Iterator[tuple[str, int]]:
        return self._containers()

    def scan_unit(self, unit: tuple[str, int]) -> Scanned:
        path, tar_nbytes = unit
        rows, stray_labels = SampleRows(), dict[str, str | None]()
        with self.place.storage.open_read(path) as file:
            members = tar_members(file, 0, tar_nbytes, rows.left_out)
            for key, group in groupby(_fields(members, rows), lambda field: field.key):
                sample = list(group)
                labels, images = _labels(file, sample), _images(sample)
                for name, offset, nbytes, _ in images:
                    own_key = splitext(name)[0]
                    qualified_key = f"{splitext(path)[0]}/{own_key}"
                    label = labels.get(own_key, labels.get(key))
                    read_first = partial(read_range, file, offset)
                    rows.add(own_key, qualified_key, path, offset, nbytes, label, read_first)
                named = {key, *(splitext(image.name)[0] for image in images)} if images else set()
                stray_labels |= {n: label for n, label in labels.items() if label and n not in named}
                rows.left_out["unreadable label"] += list(labels.values()).count(None)
                for _, field, member in sample:
                    name, offset, nbytes, problem = member
                    if problem is not None:
                        rows.reject(path, offset, nbytes, problem, key or name)
                    elif images and is_image_name(name) and member not in images:
                        rows.left_out[printable(f".{field}") + " beside an image"] += 1
                    elif not images and splitext(name)[0] not in labels:
                        rows.left_out[file_kind(name)] += 1
        rows.left_out["label without an image"] += len(stray_labels) - rows.label(stray_labels)
        return rows.scanned()


def _fields(members: Iterable[TarMember], rows: SampleRows) -> Iterator[_Field]:
    """The fields of all members; names that webdataset ignores do not split a sample."""
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match:
            yield _Field(match[1], match[2].lower(), member)
        elif member.problem is not None:
            yield _Field("", "", member)
        else:
            rows.left_out[file_kind(member.name)] += 1


def _images(sample: list[_Field]) -> list[TarMember]:
    whole = [field for field in sample if field.key and field.member.problem is None]
    for suffixes in (PHOTO_SUFFIXES, IMAGE_SUFFIXES):
        if plain := [member for _, name, member in whole if f".{name}" in suffixes]:
            return plain
    return [member for _, _, member in whole if is_image_name(member.name)]


def _labels(file: IO[bytes], sample: list[_Field]) -> dict[str, str | None]:
    """The labels of a sample, None for unreadable ones, by their member's name without suffix."""
    labels = dict[str, str | None]()  # the first `.cls` wins, else the first `.json`
    for wanted in (".cls", ".json"):
        for _, _, member in sample:
            name, suffix = splitext(member.name)
            if suffix.lower() != wanted or member.problem is not None or labels.get(name) is not None:
                continue
            data = read_range(file, member.offset, min(member.nbytes, _LONGEST_LABEL_BYTES))
            try:
                label = _label(data, is_text=wanted == ".cls")
            except (ValueError, RecursionError):
                labels.setdefault(name, None)
            else:
                labels |= {} if label is None else {name: label}
    return labels


def _label(data: bytes, is_text: bool) -> str | None:
    """Raises `ValueError` for a label that is neither a word nor a whole number."""
    if len(data) >= _LONGEST_LABEL_BYTES:
        raise ValueError(f"{len(data):,} bytes")
    if is_text:
        return data.decode("utf-8-sig").strip()
    content = json.loads(data)
    label = content.get("label") if isinstance(content, dict) else None
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError("no label")
    return None if label is None else str(label)
