"""The records that make a cache: `cache.json`, the sample and view tables, commits, quarantine.

Commit order of a shard: its files, each whole (`Storage.open_write`); its quarantine list, if any;
its commit record, last. A shard without a commit record does not exist.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import xxhash
from pydantic import Field, ValidationError
from torch import Tensor

from pipeline.errors import CacheError, CacheNotFoundError
from pipeline.spec import SCHEMA_VERSION, CacheSpec, Strict
from pipeline.storage import Storage

SPEC_NAME = "cache.json"
SAMPLES_NAME = "samples.parquet"
VIEWS_NAME = "views.parquet"
_READ_THREADS = 16

Model = TypeVar("Model", bound=Strict)


class FileRecord(Strict):
    """Size in bytes and xxh3-128 checksum of one committed file."""

    nbytes: int = Field(ge=0)
    checksum: str


class CommitRecord(Strict):
    """What makes one shard of one teacher (or of the copied images) exist.

    `invalid_rows` are absolute row numbers whose image could not be decoded; they hold no data.
    `seconds` are summed over threads, except `wall`. `members` (images only) are the byte ranges
    (offset, nbytes) of each sample of the shard in its tar, (0, 0) for an invalid one.
    """

    teacher: str
    shard: int = Field(ge=0)
    content_id: str
    first_row: int = Field(ge=0)
    num_rows: int = Field(ge=0)
    invalid_rows: tuple[int, ...] = ()
    files: dict[str, FileRecord]
    source_checksum: str
    members: tuple[tuple[int, int], ...] = ()
    seconds: dict[str, float]
    host: str
    versions: dict[str, str]
    finished: str

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())


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
        return self.storage.exists(SPEC_NAME)

    def create(self, spec: CacheSpec, samples: pa.Table, views: pa.Table) -> None:
        """Write the tables, then `cache.json`, which makes the cache exist."""
        for name, table in ((SAMPLES_NAME, samples), (VIEWS_NAME, views)):
            self.storage.write(name, _parquet_bytes(table))
        self.write_spec(spec)

    def write_spec(self, spec: CacheSpec) -> None:
        self.storage.write(SPEC_NAME, (spec.model_dump_json(indent=1) + "\n").encode())

    def spec(self) -> CacheSpec:
        """Raises `CacheNotFoundError` where there is no cache, `CacheError` where it cannot be read."""
        try:
            text = self.storage.read(SPEC_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CacheNotFoundError(
                "There is no cache here.",
                got=f"{self.storage.url} without a {SPEC_NAME}",
                expected="a folder or URL that `teachercache build` has written to",
                do="check the path, or build the cache first",
            ) from error
        return self._parse(CacheSpec, SPEC_NAME, text)

    def samples(self) -> pa.Table:
        return self._table(SAMPLES_NAME)

    def views(self) -> pa.Table:
        return self._table(VIEWS_NAME)

    def write_tables(self, teacher: str, tables: dict[str, Tensor]) -> str:
        """Keep a codec's calibrated tables; returns their hash, for the teacher's spec."""
        data = safetensors.torch.save(tables)
        self.storage.write(tables_name(teacher), data)
        return xxhash.xxh3_128_hexdigest(data)

    def tables(self, teacher: str, tables_hash: str | None) -> dict[str, Tensor]:
        """A codec's tables. Raises `CacheError` unless they are those of the spec."""
        name = tables_name(teacher)
        try:
            data = self.storage.read(name)
        except FileNotFoundError:
            data = b""
        found = xxhash.xxh3_128_hexdigest(data)
        if found != tables_hash:
            raise CacheError(
                f"{name} is not what the features of {teacher} were encoded with.",
                got=f"checksum {found}" if data else "no such file",
                expected=f"checksum {tables_hash}, as in {SPEC_NAME}",
                do="restore it from a copy; the codes cannot be decoded without it",
            )
        tables: dict[str, Tensor] = safetensors.torch.load(data)
        return tables

    def commit(self, record: CommitRecord) -> None:
        name = commit_name(record.teacher, record.shard)
        self.storage.write(name, (record.model_dump_json() + "\n").encode())

    def committed(self, teacher: str) -> set[int]:
        """Shards that have a commit record; a listing, no record is read."""
        names = self.storage.names(f"commits/{teacher}")
        return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}

    def commits(self, teacher: str, shards: Iterable[int] | None = None) -> dict[int, CommitRecord]:
        """The commit records of a teacher, by shard."""
        wanted = sorted(self.committed(teacher) if shards is None else shards)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            records = pool.map(lambda shard: self.read_commit(teacher, shard), wanted)
            return dict(zip(wanted, records, strict=True))

    def read_commit(self, teacher: str, shard: int) -> CommitRecord:
        name = commit_name(teacher, shard)
        record = self._parse(CommitRecord, name, self.storage.read(name))
        if (record.teacher, record.shard) != (teacher, shard):
            raise CacheError(
                f"{name} is the record of another shard.",
                got=f"{record.teacher} shard {record.shard}",
                expected=f"{teacher} shard {shard}",
                do=f"delete {name} and run the build again",
            )
        return record

    def write_quarantine(self, shard: int, entries: list[QuarantineEntry]) -> None:
        lines = "".join(entry.model_dump_json() + "\n" for entry in entries)
        self.storage.write(f"quarantine/{shard:05d}.jsonl", lines.encode())

    def quarantine(self) -> list[QuarantineEntry]:
        """Every quarantined sample, in order of shards."""
        entries = []
        for name in self.storage.names("quarantine"):
            path = f"quarantine/{name}"
            for line in self.storage.read(path).splitlines():
                entries.append(self._parse(QuarantineEntry, path, line))
        return entries

    def _table(self, name: str) -> pa.Table:
        try:
            return pq.read_table(pa.BufferReader(self.storage.read(name)))
        except (FileNotFoundError, pa.ArrowException, OSError) as error:
            raise CacheError(
                f"{name} of this cache cannot be read.",
                got=f"{type(error).__name__}: {error}",
                expected="the table that the build wrote before any shard",
                do="restore it from a copy; the rows cannot be named without it",
            ) from error

    def _parse(self, model: type[Model], name: str, text: bytes) -> Model:
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise CacheError(
                f"{name} of this cache cannot be understood.",
                got=f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
                expected=f"what this version of teachercache writes (schema {SCHEMA_VERSION})",
                do="run `teachercache verify` on the cache; use the version that built it if it is newer",
            ) from error


def tables_name(teacher: str) -> str:
    return f"stats/{teacher}.safetensors"


def commit_name(teacher: str, shard: int) -> str:
    return f"commits/{teacher}/{shard:05d}.json"


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
