"""The codec tables of another cache (`tables_from`): caches encoded with the same tables can be merged."""

from collections.abc import Iterator, Mapping

from teachercache.cache_builder.calibrate import Calibration
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.spec import CacheSpec, TeacherSpec
from teachercache.pipeline.records.stats_files import read_tables


def other_tables(url: str | None, teachers: Mapping[str, TeacherSpec]) -> dict[str, Calibration]:
    """Tables and fidelity from the cache at `url`, for those of these teachers whose codecs need tables.

    Hashes that a teacher does not have yet are not compared. Raises `CacheMismatchError` with every reason
    why features encoded with these tables could not be merged with that cache, and `CacheError` where it
    cannot be read.
    """
    if url is None:
        return {}
    manifest = Manifest(open_storage(url))
    other = manifest.spec()
    calibrated = {
        name: teacher for name, teacher in teachers.items() if get_codec(teacher.codec).needs_tables
    }
    if differences := list(_differences(other, calibrated)):
        raise CacheMismatchError(
            "The codec tables of that cache are not for these teachers:\n  - " + "\n  - ".join(differences),
            got=f"tables_from={url}",
            expected="a cache whose teachers of the same names have the same settings and weights",
            do="use the settings of that cache, or leave tables_from out: the codecs then learn their own "
            "tables, and the two caches cannot be merged",
        )
    return {
        name: Calibration(
            read_tables(manifest, name, other.teachers[name].tables_hash),
            dict(other.fidelity.get(name, {})),
        )
        for name in calibrated
    }


def _differences(other: CacheSpec, teachers: Mapping[str, TeacherSpec]) -> Iterator[str]:
    for name, ours in teachers.items():
        theirs = other.teachers.get(name)
        if theirs is None:
            yield f"teachers.{name}: that cache has {', '.join(other.teachers) or 'no teacher'}"
            continue
        for field in TeacherSpec.model_fields.keys() - {"checkpoint"}:
            here, there = getattr(ours, field), getattr(theirs, field)
            unknown = here is None and field in ("weights_hash", "tables_hash")
            if here != there and not unknown:
                yield f"teachers.{name}.{field}: {there!r} there, {here!r} here"
