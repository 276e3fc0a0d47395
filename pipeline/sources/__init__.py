"""Where images come from: four kinds of source, one sample table, one decode.

source = open_source("/data/imagenet/train")       the kind is told by looking
samples = source.scan(workers=8)                   SAMPLE_SCHEMA, sorted by key
image = decode_image(source.read(path, offset, nbytes))
"""

from __future__ import annotations

import os
from itertools import groupby, islice
from posixpath import dirname, splitext

from pipeline.errors import RecipeError, SourceError
from pipeline.sources.base import (
    IMAGE_SUFFIXES,
    SAMPLE_SCHEMA,
    Source,
    dataset_fingerprint,
    no_image_error,
)
from pipeline.sources.decode import MAX_PIXELS, decode_image
from pipeline.sources.ilsvrc import ILSVRCSource
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.place import Place
from pipeline.sources.tar import tar_members
from pipeline.sources.webdataset import WebDatasetSource

_SOURCES: dict[str, type[Source]] = {
    source.kind: source for source in (ImageFolderSource, WebDatasetSource, ParquetSource, ILSVRCSource)
}
_KIND_OF_SUFFIX = dict.fromkeys(IMAGE_SUFFIXES, ImageFolderSource.kind) | {
    ".tar": WebDatasetSource.kind,
    ".parquet": ParquetSource.kind,
}
_NAMES_SHOWN_OF = 10_000


def source_kinds() -> list[str]:
    return list(_SOURCES)


def open_source(location: str | os.PathLike[str], kind: str = "auto") -> Source:
    """The images at a folder, file, pattern or fsspec URL. Nothing is read but, for "auto", a listing.

    Raises `SourceNotFoundError`, `EmptySourceError`, and `SourceError` when the kind cannot be told.
    """
    if kind != "auto" and kind not in _SOURCES:
        raise RecipeError(
            "There is no source of this kind.",
            got=repr(kind),
            expected=f"auto, or one of {', '.join(_SOURCES)}",
            do="leave it at auto, which looks at the files",
        )
    place = Place.at(location)
    return _SOURCES[_look(place) if kind == "auto" else kind](place)


def _look(place: Place) -> str:
    """The kind that the first folder with any known file tells: images, tars or Parquet files."""
    for folder, files in groupby(place.files(), lambda file: dirname(file[0])):
        suffixes = {splitext(name)[1].lower(): (name, nbytes) for name, nbytes in files}
        kinds = {_KIND_OF_SUFFIX[suffix] for suffix in suffixes if suffix in _KIND_OF_SUFFIX}
        if len(kinds) > 1:
            raise SourceError(
                "It cannot be told what kind of source this is.",
                got=f"{', '.join(sorted(set(suffixes) & set(_KIND_OF_SUFFIX)))} side by side in "
                f"{place.storage.url}/{folder}".rstrip("/"),
                expected="images, tars or Parquet files, one of these",
                do=f"name the kind ({', '.join(_SOURCES)}), or choose files with a pattern such as …/*.tar",
            )
        if kinds == {WebDatasetSource.kind}:
            return _look_into_tar(place, *suffixes[".tar"])
        if kinds:
            return kinds.pop()
    names = islice((name for name, _ in place.files()), _NAMES_SHOWN_OF)
    raise no_image_error(place.location, names, "no image here")


def _look_into_tar(place: Place, path: str, nbytes: int) -> str:
    with place.storage.open_read(path) as file:
        first = next(tar_members(file, 0, nbytes), None)
    holds_tars = first is not None and splitext(first.name)[1].lower() == ".tar"
    return ILSVRCSource.kind if holds_tars else WebDatasetSource.kind


__all__ = [
    "MAX_PIXELS",
    "SAMPLE_SCHEMA",
    "Source",
    "dataset_fingerprint",
    "decode_image",
    "open_source",
    "source_kinds",
]
