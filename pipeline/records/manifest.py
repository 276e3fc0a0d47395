"""The records that make a cache: `cache.json`, the sample and view tables, commits, quarantine.

Commit order of a shard: its files, each whole (`Storage.open_write`); its quarantine list, if any;
its commit record, last. A shard without a commit record does not exist.

The record holds the checksums of the shard's files. A file that no record names carries its own (`seal`), in
a last entry "checksum": a key of JSON objects, the last line of a quarantine list, metadata of a table.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import pyarrow as pa
import xxhash
from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from teachercache.pipeline.errors import AlreadyCommittedError, CacheError, CacheNotFoundError, StorageError
from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.storage import Storage, first_contact
from teachercache.pipeline.records import limits, tables
from teachercache.pipeline.records.seal import UNSEALED, is_intact, seal
from teachercache.pipeline.records.spec import IMAGES, SCHEMA_VERSION, CacheSpec
from teachercache.pipeline.records.strict import Strict

SPEC_NAME = "cache.json"
SAMPLES_NAME = "samples.parquet"
VIEWS_NAME = "views.parquet"
RESTORE_TABLES = "restore it from a copy; the codes cannot be decoded without it"
_READ_THREADS = 16
_MAX_RECORD_BYTES = 1 << 26  # enough for a shard of a million copied images

Model = TypeVar("Model", bound=Strict)


class FileRecord(Strict):
    """Size in bytes and xxh3-128 checksum of one committed file.

    `ends` is the xxh3-64 of its first 4 and last 64 KiB, by which a reader recognises the file when it first
    opens it; empty in older records.
    """

    nbytes: int = Field(ge=0)
    checksum: str
    ends: str = ""

    @classmethod
    def of(cls, file: ChecksumWriter) -> Self:
        """The record of a file that is completely written."""
        return cls(nbytes=file.nbytes, checksum=file.checksum, ends=file.ends)


class CommitRecord(Strict):
    """What makes one shard of one teacher (or of the images) exist.

    `invalid_rows` are the absolute numbers of rows whose image could not be decoded; they hold no data.
    `seconds` are summed over threads, except `wall`. `worker` names the process that computed the shard, as
    host:pid; it is empty in older records, and where rows were copied. `members` (of copied images) are the
    byte ranges (offset, nbytes) of each sample of the shard in its tar, (0, 0) for an invalid one.
    """

    teacher: str
    shard: int = Field(ge=0, lt=limits.MAX_SHARDS)
    content_id: str
    first_row: int = Field(ge=0, lt=limits.MAX_ROWS)
    num_rows: int = Field(ge=0, le=limits.MAX_ROWS_PER_SHARD)
    invalid_rows: tuple[int, ...] = ()
    files: dict[str, FileRecord]
    source_checksum: str
    members: tuple[tuple[int, int], ...] = ()
    seconds: dict[str, float]
    host: str
    worker: str = ""
    versions: dict[str, str]
    finished: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        rows = range(self.first_row, self.first_row + self.num_rows)
        if any(row not in rows for row in self.invalid_rows):
            raise ValueError(f"invalid_rows must be rows of the shard, {rows}")
        if any(offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes for offset, nbytes in self.members):
            raise ValueError(f"members must be byte ranges of a tar of {self.nbytes} bytes")
        return self

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    def mismatch(self, spec: CacheSpec) -> str | None:
        """Why this record cannot be one of the cache `spec`, or None."""
        if self.shard >= spec.num_shards:
            return f"shard {self.shard} does not exist in a cache of {spec.num_shards} shards"
        if self.teacher != IMAGES and self.teacher not in spec.teachers:
            return f"is of {self.teacher}, a teacher that the cache does not have"
        if self.content_id != (expected := spec.shard_content_id(self.teacher, self.shard)):
            return f"was computed for another spec: content id {self.content_id}, expected {expected}"
        rows = spec.shard_rows(self.shard)
        if (self.first_row, self.num_rows) != (rows.start, len(rows)):
            return f"holds {self.num_rows} rows from row {self.first_row}, expected {rows}"
        copied = self.teacher == IMAGES and spec.images != "rendered"
        if copied and len(self.members) != len(spec.shard_samples(self.shard)):
            return f"holds {len(self.members)} images, expected {len(spec.shard_samples(self.shard))}"
        return None


class QuarantineEntry(Strict):
    """One sample that could not be decoded."""

    sample_index: int
    key: str
    location: str
    reason: str


class Manifest:
    """Reads and writes a cache's records."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def exists(self) -> bool:
        with first_contact(self.storage):
            return self.storage.exists(SPEC_NAME)

    def create(self, spec: CacheSpec, samples: pa.Table, views: pa.Table) -> None:
        """Write the tables, then `cache.json`, which makes the cache exist."""
        self.write_table(SAMPLES_NAME, samples)
        self.write_table(VIEWS_NAME, views)
        self.write_spec(spec)

    def write_table(self, name: str, table: pa.Table) -> None:
        self.storage.write(name, tables.table_bytes(table))

    def write_spec(self, spec: CacheSpec) -> None:
        """Raises `CacheError` for a spec that no reader would accept."""
        limits.check_limits(spec)
        self.storage.write(SPEC_NAME, _json_bytes(spec, indent=1))

    def spec(self) -> CacheSpec:
        """Raises `CacheNotFoundError` where there is no cache, `CacheError` where it cannot be read."""
        try:
            with first_contact(self.storage):
                data = self._read(SPEC_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CacheNotFoundError(
                "There is no cache here.",
                got=f"{self.storage.url} without a {SPEC_NAME}",
                expected="a folder or URL that `teachercache build` has written to",
                do=self.storage.if_absent,
            ) from error
        spec = _parse(CacheSpec, SPEC_NAME, data)
        limits.check_limits(spec)
        return spec

    def samples(self, spec: CacheSpec) -> pa.Table:
        """The samples of `spec`, one line each; a cache that is growing has further lines after them.

        Raises `CacheError` unless they are those that the spec was made with.
        """
        dataset = spec.dataset
        table = self._table(SAMPLES_NAME, tables.SAMPLE_SCHEMA, dataset.num_samples).combine_chunks()
        hashes = {"fingerprint": tables.dataset_fingerprint(table), "labels_hash": tables.labels_hash(table)}
        for name, stated in (("fingerprint", dataset.fingerprint), ("labels_hash", dataset.labels_hash)):
            if stated is not None and hashes[name] != stated:
                raise self._foreign(SAMPLES_NAME, f"samples with {name} {hashes[name]}", stated)
        return table

    def views(self, spec: CacheSpec) -> pa.Table:
        """The views of `spec`, one line per row, segment by segment; otherwise as `samples`."""
        table = self._table(VIEWS_NAME, tables.VIEW_SCHEMA, spec.num_rows)
        for segment, lines in tables.segment_lines(spec, table):
            actual = tables.views_hash(lines, segment.samples[0])
            if segment.views_hash is not None and actual != segment.views_hash:
                raise self._foreign(VIEWS_NAME, f"views with hash {actual}", segment.views_hash)
        return table

    def _foreign(self, name: str, got: str, stated: str) -> CacheError:
        return CacheError(
            f"{name} is sound, but it is not the table of this cache.",
            got=got,
            expected=f"{stated}, as in {SPEC_NAME}: the table that the features were computed with",
            do=f"restore it from a copy of this very cache, or run: teachercache repair {self.storage.url}",
        )

    @contextmanager
    def publishing(
        self, shard: int, teachers: Iterable[str], waiting: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """A lock held from before a shard's files get their names until its records are written.

        Of several jobs that computed the same shard, one publishes it, files and records together.
        Raises `AlreadyCommittedError` for the others, which call `waiting` until then.
        """
        with self.storage.exclusive(f"commits/{shard:05d}", waiting):
            committed = [teacher for teacher in teachers if self.is_committed(teacher, shard)]
            if committed:
                raise AlreadyCommittedError(
                    f"Another job has committed shard {shard} of {', '.join(committed)} in the meantime."
                )
            yield

    def is_committed(self, teacher: str, shard: int) -> bool:
        return self.storage.exists(commit_name(teacher, shard))

    def commit(self, record: CommitRecord) -> None:
        self.storage.write(commit_name(record.teacher, record.shard), _json_bytes(record))

    def committed_shards(self, teacher: str) -> set[int]:
        """Shards that have a commit record, by a listing: no record is read."""
        return _numbers(self.storage.names(f"commits/{teacher}"), ".json")

    def commits(self, teacher: str, shards: Iterable[int] | None = None) -> dict[int, CommitRecord]:
        """The commit records of a teacher, by shard."""
        numbers = sorted(self.committed_shards(teacher) if shards is None else shards)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            records = pool.map(lambda shard: self.read_commit(teacher, shard), numbers)
            return dict(zip(numbers, records, strict=True))

    def read_commit(self, teacher: str, shard: int) -> CommitRecord:
        name = commit_name(teacher, shard)
        record = _parse(CommitRecord, name, self._read(name))
        if (record.teacher, record.shard) != (teacher, shard):
            raise CacheError(
                f"{name} is the record of another shard.",
                got=f"{record.teacher} shard {record.shard}",
                expected=f"{teacher} shard {shard}",
                do=f"delete {name} and run the build again",
            )
        return record

    def codec_tables(self, teacher: str, tables_hash: str | None) -> bytes:
        """A codec's tables, as safetensors. Raises `CacheError` unless they are those of the spec."""
        name = tables_name(teacher)
        data = self.storage.read(name) if self.storage.exists(name) else None
        found = None if data is None else xxhash.xxh3_128_hexdigest(data)
        if data is None or found != tables_hash:
            got = "no such file" if data is None else f"checksum {found}"
            raise foreign_tables(teacher, got, f"checksum {tables_hash}, as in {SPEC_NAME}")
        return data

    def write_quarantine(
        self, shard: int, entries: list[QuarantineEntry], source_checksum: str | None = None
    ) -> None:
        """`source_checksum`: that of the shard's records, which identifies the images of the list."""
        end = {"source_checksum": source_checksum, "checksum": UNSEALED}
        lines = [entry.model_dump_json() for entry in entries] + [json.dumps(end)]
        self.storage.write(quarantine_name(shard), seal("".join(line + "\n" for line in lines).encode()))

    def quarantine(self) -> list[QuarantineEntry]:
        """Every quarantined sample, in the order of the shards."""
        return [entry for shard in sorted(self.quarantined()) for entry in self.read_quarantine(shard)]

    def quarantined(self) -> set[int]:
        """Shards that have a quarantine list."""
        return _numbers(self.storage.names("quarantine"), ".jsonl")

    def read_quarantine(self, shard: int) -> list[QuarantineEntry]:
        name = quarantine_name(shard)
        *lines, _ = self._read(name).splitlines()
        return [_parse(QuarantineEntry, name, line) for line in lines]

    def quarantine_source(self, shard: int) -> str | None:
        """The `source_checksum` of a shard's quarantine list; None in older ones."""
        *_, end = self._read(quarantine_name(shard)).splitlines()
        return from_json(end).get("source_checksum")

    def _read(self, name: str) -> bytes:
        """A sealed file of records. Raises `CacheError` for any damage."""
        return self._intact(name, self.storage.read_range(name, 0, _MAX_RECORD_BYTES))

    def _intact(self, name: str, data: bytes) -> bytes:
        if not is_intact(data):
            raise CacheError(
                f"{name} of this cache was damaged or edited.",
                got=f"{len(data)} bytes that do not have the checksum they state",
                expected="the file as teachercache wrote it",
                do=f"restore {SPEC_NAME} from a copy; nothing else says what the rows are"
                if name == SPEC_NAME
                else f"run: teachercache repair {self.storage.url}",
            )
        return data

    def _table(self, name: str, schema: pa.Schema, num_rows: int) -> pa.Table:
        """The first `num_rows` lines of a table."""
        limit = limits.MAX_TABLE_NBYTES + limits.MAX_NBYTES_PER_LINE * num_rows
        try:
            if (nbytes := self.storage.size(name) or 0) > limit:
                raise ValueError(f"{nbytes:,} bytes for {num_rows:,} lines")
            data = self._intact(name, self.storage.read_range(name, 0, limit))
            return tables.table_lines(data, schema, num_rows)
        except StorageError:
            raise
        except (FileNotFoundError, pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(
                f"{name} of this cache cannot be read.",
                got=f"{type(error).__name__}: {error}",
                expected="the table that the build wrote before any shard",
                do=f"run: teachercache repair {self.storage.url}",
            ) from error


def _parse(model: type[Model], name: str, text: bytes) -> Model:
    try:
        content = from_json(text)
        if isinstance(content, dict):
            content.pop("checksum", None)
        return model.model_validate(content)
    except (ValueError, RecursionError) as error:
        raise CacheError(
            f"{name} of this cache cannot be understood.",
            got=_first_problem(error),
            expected=f"what this version of teachercache writes (schema {SCHEMA_VERSION})",
            do="run `teachercache verify` on the cache; if another version wrote it, read it with that "
            "one, or build it again",
        ) from error


def _numbers(names: Iterable[str], suffix: str) -> set[int]:
    """The shards whose files these are; those are named like 00042.json."""
    matches = (re.fullmatch(r"([0-9]{5,12})" + re.escape(suffix), name) for name in names)
    return {int(match[1]) for match in matches if match}


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"


def foreign_tables(teacher: str, got: str, expected: str) -> CacheError:
    problem = f"{tables_name(teacher)} is not what the features of {teacher} were encoded with."
    return CacheError(problem, got=got, expected=expected, do=RESTORE_TABLES)


def tables_name(teacher: str) -> str:
    return f"stats/{teacher}.safetensors"


def moments_name(teacher: str, shard: int) -> str:
    return f"stats/{teacher}/{shard:05d}.safetensors"


def commit_name(teacher: str, shard: int) -> str:
    return f"commits/{teacher}/{shard:05d}.json"


def quarantine_name(shard: int) -> str:
    return f"quarantine/{shard:05d}.jsonl"


def _json_bytes(record: Strict, indent: int | None = None) -> bytes:
    content: dict[str, Any] = record.model_dump(mode="json") | {"checksum": UNSEALED}
    return seal((json.dumps(content, indent=indent) + "\n").encode())
