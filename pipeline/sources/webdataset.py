"""WebDataset tars, such as those of `timm/imagenet-1k-wds`: `key.jpg` with `key.cls` or `key.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import attrgetter
from posixpath import splitext
from typing import IO, NamedTuple

import pyarrow as pa

from pipeline.sources.base import IMAGE_SUFFIXES, SampleRows, is_image_name
from pipeline.sources.tar import TarMember, TarSource, read_range, tar_members

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_LONGEST_LABEL_BYTES = 1 << 16


class _Field(NamedTuple):
    key: str
    name: str
    member: TarMember


class WebDatasetSource(TarSource):
    """A tar, or the tars of a folder or pattern. Members are read by byte range, never extracted.

    As webdataset has it, a member's key ends and its field begins at the first dot of its base name, and
    the members of one sample lie together: beside `a.jpg`, `a.seg.png` is the field `seg.png` of sample
    `a`. Only in a sample without a plain image field are such members images, named without suffix.
    The label is the text of `cls`, or else `label` in `json`. A key that occurs in several tars becomes
    `<tar without suffix>/<key>` in each; of those in one tar, the first sample has it so, and the
    later ones get the status "duplicate key" under `<tar without suffix>/<key>#<offset>`.
    """

    kind = "webdataset"

    def _units(self) -> Iterator[tuple[str, int]]:
        return self._tars()

    def _scan_unit(self, unit: tuple[str, int]) -> pa.Table:
        path, tar_nbytes = unit
        rows = SampleRows()
        with self.place.storage.open_read(path) as file:
            fields = (_Field(*_split(member.name), member) for member in tar_members(file, 0, tar_nbytes))
            for key, group in groupby(fields, attrgetter("key")):
                sample = list(group)
                label = _label(file, sample)
                for name, offset, nbytes, _ in _images(sample):
                    own_key = splitext(name)[0]
                    qualified_key = f"{splitext(path)[0]}/{own_key}"
                    read_first = partial(read_range, file, offset)
                    rows.add(own_key, qualified_key, path, offset, nbytes, label, read_first)
                for _, _, (name, offset, nbytes, problem) in sample:
                    if problem is not None:
                        rows.reject(path, offset, nbytes, problem, key or name)
        return rows.table()


def _split(name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _images(sample: list[_Field]) -> list[TarMember]:
    whole = [field for field in sample if field.key and field.member.problem is None]
    plain = [member for _, name, member in whole if f".{name}" in IMAGE_SUFFIXES]
    return plain or [member for _, _, member in whole if is_image_name(member.name)]


def _label(file: IO[bytes], sample: list[_Field]) -> str | None:
    texts = {
        name: read_range(file, member.offset, member.nbytes).decode(errors="replace")
        for _, name, member in sample
        if name in ("cls", "json") and member.nbytes <= _LONGEST_LABEL_BYTES
    }
    if "cls" in texts:
        return texts["cls"].strip()
    try:
        content = json.loads(texts.get("json", "null"))
    except (ValueError, RecursionError):
        return None
    label = content.get("label") if isinstance(content, dict) else None
    return str(label) if isinstance(label, int | str) else None
