"""Where images come from: four kinds of source, and several as one; one sample table, one decode.

    source = open_source("/data/imagenet/train")       detects the kind
    samples = source.scan(workers=8)                   SAMPLE_SCHEMA, sorted by key
    image = decode_image(source.read(path, offset, nbytes))

The same images under the same keys have the same `dataset_fingerprint`, whatever holds them.
"""

import os
from itertools import islice
from posixpath import basename, splitext

from teachercache.pipeline.errors import SourceError, require_known
from teachercache.pipeline.sources.decode import decode_image
from teachercache.pipeline.sources.image_folder import ImageFolderSource
from teachercache.pipeline.sources.parquet import ParquetSource
from teachercache.pipeline.sources.place import Place
from teachercache.pipeline.sources.several import SeveralSources
from teachercache.pipeline.sources.source import PHOTO_SUFFIXES, Source, is_image_name, no_image_error
from teachercache.pipeline.sources.tar import ILSVRCSource, tar_members
from teachercache.pipeline.sources.webdataset import WebDatasetSource

_SOURCES: dict[str, type[Source]] = {
    source.kind: source for source in (ImageFolderSource, WebDatasetSource, ParquetSource, ILSVRCSource)
}
_KIND_OF_SUFFIX = dict.fromkeys(PHOTO_SUFFIXES, ImageFolderSource.kind) | {
    ".tar": WebDatasetSource.kind,
    ".parquet": ParquetSource.kind,
}
_FILES_LOOKED_AT = 10_000
_TARS_LOOKED_AT = 8


def open_source(location: str | os.PathLike[str], kind: str = "auto") -> Source:
    """The images at a folder, file, pattern or fsspec URL; "auto" looks at the files to detect the kind.
    Of kind "several", `location` names several of these (`several.py`).

    Raises `SourceNotFoundError`, `EmptySourceError`, and `SourceError` when the kind is ambiguous.
    """
    if kind == SeveralSources.kind:
        return SeveralSources.at(os.fspath(location), open_source)
    require_known("kind of source", kind, ("auto", *_SOURCES), "leave it at auto, which looks at the files")
    place = Place.at(location)
    return _SOURCES[_look(place) if kind == "auto" else kind](place)


def _look(place: Place) -> str:
    """The kind that the first files of a place have in common: images, tars or Parquet files."""
    files = [
        file for file in islice(place.files(), _FILES_LOOKED_AT) if not basename(file[0]).startswith("._")
    ]
    suffixes = {splitext(name)[1].lower() for name, _ in files} & set(_KIND_OF_SUFFIX)
    kinds = {_KIND_OF_SUFFIX[suffix] for suffix in suffixes}
    if not kinds and any(is_image_name(name) for name, _ in files):
        kinds = {ImageFolderSource.kind}
    if kinds == {WebDatasetSource.kind}:
        tars = (file for file in files if splitext(file[0])[1].lower() == ".tar")
        kinds = {_look_into_tar(place, *tar) for tar in islice(tars, _TARS_LOOKED_AT)}
    if not kinds:
        raise no_image_error(place.location, [name for name, _ in files], "no image here")
    if len(kinds) > 1:
        raise SourceError(
            "The kind of this source is ambiguous.",
            got=f"{' and '.join(sorted(kinds))}, by {', '.join(sorted(suffixes))} files in {place.location}",
            expected="one kind of images, tars or Parquet files",
            do="name the kind, or choose files with a pattern such as …/train-*.tar",
        )
    return kinds.pop()


def _look_into_tar(place: Place, path: str, nbytes: int) -> str:
    with place.storage.open_read(path) as file:
        shown = (m.name for m in tar_members(file, 0, nbytes) if not basename(m.name).startswith("."))
        holds_tars = splitext(next(shown, ""))[1].lower() == ".tar"
    return ILSVRCSource.kind if holds_tars else WebDatasetSource.kind


__all__ = ["Source", "decode_image", "open_source"]
