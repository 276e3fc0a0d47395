"""What is wrong with a cache's records, with the files that they name, and with its tables.

One place asks, and each fault has one sentence, whoever wants to know: `verify`, `inspect`, repair, a reader
at its first touch of a shard, whoever links shards. No torch here: `inspect` has no time for it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from teachercache.pipeline.errors import (
    CacheError,
    CacheMismatchError,
    CorruptShardError,
    StorageError,
    in_a_line,
)
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.remote_storage import RemoteStorage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.manifest import (
    RESTORE_TABLES,
    SAMPLES_NAME,
    VIEWS_NAME,
    CommitRecord,
    FileRecord,
    Manifest,
    QuarantineEntry,
    commit_name,
    quarantine_name,
    tables_name,
)
from teachercache.pipeline.records.spec import IMAGES, CacheSpec

_THREADS, _READING_THREADS = 32, 8  # that wait for answers; that hash, which releases the GIL

SizeOf = Callable[[str], int | None]


class Depth(IntEnum):
    """How far the files of a shard are looked into."""

    RECORD = 0  # not at all
    SIZES = 1
    ENDS = 2  # sizes, and the first 4 and last 64 KiB
    BYTES = 3


@dataclass(frozen=True)
class Problem:
    """A file that cannot be trusted, and why; what to `do` where a repair cannot make it again.

    `teacher` (or "images") and `shard` say what it belongs to: both for a shard and its record, the shard
    alone for a quarantine list, the teacher alone for the layout of its arrays, neither for the tables.
    """

    file: str
    reason: str
    teacher: str | None = None
    shard: int | None = None
    do: str | None = None

    def error(self, storage: Storage) -> CorruptShardError:
        """For those who cannot go on with such a file."""
        return CorruptShardError(
            f"{self.reason}.",
            expected="what was committed",
            do=self.do
            or f"run: teachercache verify {storage.url}; teachercache repair makes such files again",
        )


class Checked(NamedTuple):
    """A committed shard: its record, unless that is broken, and what is wrong with it or with its files."""

    teacher: str
    record: CommitRecord | None
    problems: list[Problem]


def fault(
    storage: Storage, name: str, file: FileRecord, depth: Depth, size_of: SizeOf | None = None
) -> str | None:
    """What is wrong with a committed file, or None."""
    size = (size_of or storage.size)(name)
    if size is None:
        return f"{name} is missing"
    if size != file.nbytes:
        return f"{name} has {size:,} bytes, expected {file.nbytes:,}"
    if depth == Depth.BYTES:
        what, found, expected = "checksum", storage.checksum(name), file.checksum
    elif depth == Depth.ENDS and file.ends:
        what, [found], expected = "hash of its ends", storage.ends([name], [size]), file.ends
    else:
        return None
    other = f"{name} is not the file that was committed: {what} {found}, expected {expected}"
    return None if found == expected else other


def have_their_ends(storage: Storage, records: Iterable[CommitRecord]) -> bool:
    """Whether the files of all these records begin and end as they did, all asked for at once.

    Without the statistics, which are read whole. Raises `FileNotFoundError`.
    """
    files = {
        name: file
        for record in records
        for name, file in record.files.items()
        if file.ends and not name.startswith("stats/")
    }
    found = storage.ends(list(files), [file.nbytes for file in files.values()])
    return found == [file.ends for file in files.values()]


def file_problems(
    storage: Storage, record: CommitRecord, depth: Depth, size_of: SizeOf | None = None
) -> list[Problem]:
    """Of the files that a record names."""
    problems = []
    for name, file in record.files.items() if depth > Depth.RECORD else ():
        try:
            reason = fault(storage, name, file, depth, size_of)
        except (CacheError, OSError) as error:
            reason = _as_fault(storage, error)
        if reason is not None:
            problems.append(Problem(name, reason, record.teacher, record.shard))
    return problems


def record_problem(record: CommitRecord, spec: CacheSpec, files: Iterable[str] = ()) -> Problem | None:
    """Of a record that is not one of the cache `spec`, or does not name all of these files."""
    name, reason = commit_name(record.teacher, record.shard), record.mismatch(spec)
    if reason is None and (missing := set(files).difference(record.files)):
        reason = f"does not name {', '.join(sorted(missing))}"
    return None if reason is None else Problem(name, f"{name} {reason}", record.teacher, record.shard)


def check_shards(
    manifest: Manifest,
    spec: CacheSpec,
    depth: Depth,
    shards: Collection[int] | None = None,
    files: Callable[[str, int], Iterable[str]] = lambda teacher, shard: (),
) -> Iterator[Checked]:
    """These committed shards, or all, in the order of teachers and shards.

    `files` of a shard, by teacher and number, are those that its record must name.
    """
    storage, size_of = manifest.storage, None
    if isinstance(storage, RemoteStorage) and shards is None and depth > Depth.RECORD:
        folders = [f"{kind}/{name}" for name in spec.with_arrays for kind in ("teachers", "stats")]
        listed = (storage.sizes(folder) for folder in (*folders, IMAGES))  # alone, each would be a request
        size_of = {name: size for sizes in listed for name, size in sizes.items()}.get

    def check(place: tuple[str, int]) -> Checked:
        teacher, shard = place
        try:
            record = manifest.read_commit(teacher, shard)
            problem = record_problem(record, spec, files(teacher, shard))
        except (CacheError, OSError) as error:
            problem = Problem(commit_name(*place), _as_fault(storage, error), *place)
        if problem is not None:
            return Checked(teacher, None, [problem])
        return Checked(teacher, record, file_problems(storage, record, depth, size_of))

    places = [
        (teacher, shard)
        for teacher in spec.teachers_and_images
        for shard in sorted(manifest.committed_shards(teacher))
        if shards is None or shard in shards
    ]
    if isinstance(storage, LocalStorage) and depth <= Depth.SIZES:  # threads would only wait for each other
        yield from map(check, places)
    else:
        with ThreadPoolExecutor(_READING_THREADS if depth == Depth.BYTES else _THREADS) as pool:
            yield from pool.map(check, places)


def table_problems(manifest: Manifest, spec: CacheSpec) -> list[Problem]:
    """Of the sample and view tables, by how many lines they state; of the tables that codecs decode with."""
    counts = {SAMPLES_NAME: spec.dataset.num_samples, VIEWS_NAME: spec.num_rows}
    faults = ((name, _lines_fault(manifest.storage, name, count)) for name, count in counts.items())
    problems = [Problem(name, reason) for name, reason in faults if reason is not None]
    for name, teacher in spec.teachers.items():
        if teacher.tables_hash is not None:
            try:
                manifest.codec_tables(name, teacher.tables_hash)
            except CacheError as error:
                problems.append(Problem(tables_name(name), in_a_line(error), do=RESTORE_TABLES))
    return problems


def _lines_fault(storage: Storage, name: str, num_rows: int) -> str | None:
    try:
        with storage.open_read(name) as file:
            found = pq.ParquetFile(file).metadata.num_rows
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, pa.ArrowException) as error:
        return f"{name} cannot be read: {_as_fault(storage, error)}"
    return None if found >= num_rows else f"{name} has {found:,} lines, expected {num_rows:,}"


def quarantine(manifest: Manifest) -> tuple[list[QuarantineEntry], list[Problem]]:
    """Every quarantined sample, once, and the lists that cannot be read."""
    entries, problems = dict[int, QuarantineEntry](), []
    for shard in sorted(manifest.quarantined()):
        try:
            entries |= {entry.sample_index: entry for entry in manifest.read_quarantine(shard)}
        except (CacheError, OSError) as error:
            problems.append(Problem(quarantine_name(shard), _as_fault(manifest.storage, error), shard=shard))
    return list(entries.values()), problems


def require_same_images(
    manifest: Manifest, spec: CacheSpec, shard: int, source_checksum: str, replaced: Collection[str] = ()
) -> None:
    """Raises `CacheMismatchError` where a shard's records come from other images.

    Records about to be replaced count only where there are no others, since they may be the broken ones.
    """
    checksums: dict[str, str] = {}
    for teacher in (*spec.teachers, IMAGES):
        if not manifest.is_committed(teacher, shard):
            continue
        try:
            record = manifest.read_commit(teacher, shard)
        except CacheError:
            if teacher not in replaced:
                raise
            continue
        if record.source_checksum and (teacher not in replaced or record.mismatch(spec) is None):
            checksums[teacher] = record.source_checksum
    kept = {teacher: checksum for teacher, checksum in checksums.items() if teacher not in replaced}
    for teacher, checksum in kept.items() or checksums.items():
        if checksum != source_checksum:
            raise CacheMismatchError(
                f"The images of shard {shard} are not those that {teacher} was computed from.",
                got=f"images with checksum {source_checksum}",
                expected=f"checksum {checksum}, as in {commit_name(teacher, shard)}",
                do="restore the images as they were, or delete all commit records of this shard to compute "
                "it again for every teacher",
            )


def _as_fault(storage: Storage, error: Exception) -> str:
    """Raises `error` where a store does not answer: it does not for any file. A disk has bad places."""
    if not isinstance(storage, LocalStorage) and isinstance(error, (StorageError, PermissionError)):
        raise error
    return in_a_line(error)
