"""What every source offers: a sample table, and random access to the encoded images in it."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context
from posixpath import basename, splitext
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from teachercache.pipeline.errors import EmptySourceError, ImageDecodeError, SourceError, SourceNotFoundError
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.tables import SAMPLE_SCHEMA
from teachercache.pipeline.sources.decode import HEAD_BYTES, probe_size
from teachercache.pipeline.sources.keys import OK, name_problem, printable, with_unique_keys
from teachercache.pipeline.sources.place import Place

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif")
IMAGE_SUFFIXES = (*PHOTO_SUFFIXES, ".apng", ".gif", ".bmp", ".tif", ".tiff")  # all that `decode.py` reads

_UNIT_SCHEMA = SAMPLE_SCHEMA.append(pa.field("qualified_key", pa.string()))

_SECONDS_ALONE = 2.0  # the cost of starting processes
_REMOTE_THREADS = 32
_UNITS_AHEAD_PER_WORKER = 4
_NAMES_LOOKED_AT = 10_000
_KINDS_NAMED = 8

Scanned = tuple[pa.Table, Counter[str]]  # the rows of a unit, and what it leaves out, by kind


class Source(ABC):
    """Images at a place. Holds no open file: picklable, safe to fork and to use from threads."""

    kind: ClassVar[str]
    container: ClassVar[str] = ""  # the suffix of files that hold images

    def __init__(self, place: Place) -> None:
        self.place = place
        self.location = place.location

    @abstractmethod
    def units(self) -> Iterable[Any]:
        """Picklable pieces of work, in the order (path, offset) of their rows."""

    @abstractmethod
    def scan_unit(self, unit: Any) -> Scanned:
        """`SampleRows.scanned()` of one unit. Runs in another process or thread."""

    @property
    def is_local(self) -> bool:
        return self.place.is_local

    def names(self) -> Iterator[str]:
        """The names among which images are sought, for the error when there are none."""
        return (name for name, _ in self.place.files())

    def other_files(self) -> Iterable[str]:
        """The kind of each file that a scan leaves out before it reaches units."""
        files = self.place.files() if self.container else ()
        return (file_kind(path) for path, _ in files if not self._is_container(path))

    def listing(self) -> str:
        """xxh3-128, in hex, of the names and sizes of this source's files: no file is opened."""
        digest = xxhash.xxh3_128()
        for name, nbytes in self.place.files():
            digest.update(f"{nbytes} {name}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def scan(
        self,
        workers: int = 1,
        progress: Callable[[int], None] | None = None,
        left_out: Counter[str] | None = None,
    ) -> pa.Table:
        """The table of all samples, `SAMPLE_SCHEMA`, sorted by key (which is unique).

        Every image has a row; one that cannot be used (an unreadable header, an unsafe name, the place
        where a tar is cut) has a `status` that says why. `progress` is called with the number of rows
        since its last call. `workers` processes read local files, threads read remote ones. `left_out`
        counts, by kind, files that neither are nor describe images (`left_out_line` formats it).
        Raises `EmptySourceError`, `SourceNotFoundError`, `SourceError`.
        """
        tables = []
        try:
            for table, left_out_of_unit in self._scan_units(workers):
                tables.append(table)
                if left_out is not None:
                    left_out.update(left_out_of_unit)
                if progress is not None:
                    progress(table.num_rows)
            if left_out is not None:
                left_out.update(self.other_files())
        except (FileNotFoundError, PermissionError) as error:
            failure = SourceNotFoundError if isinstance(error, FileNotFoundError) else SourceError
            raise failure(
                "A source cannot be read.",
                got=str(error),
                expected=f"files under {self.location} that stay there and may be read",
                do="fix the permissions or the mount, and run the same command again",
            ) from error
        except BrokenProcessPool as error:
            raise SourceError(
                "A process that was scanning images died.",
                got=f"{workers} workers",
                expected="memory for each, and code in a script file, below `if __name__ == '__main__'`",
                do="scan with fewer workers; one worker starts no process",
            ) from error
        samples = pa.concat_tables([_UNIT_SCHEMA.empty_table(), *tables])
        if not pc.any(pc.equal(samples["status"], OK)).as_py():
            raise self._empty(samples)
        return with_unique_keys(samples).sort_by("key").combine_chunks()

    def labels(self) -> set[str | None]:
        """Of all samples, whatever their status."""
        return set(self.scan()["label"].to_pylist())

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """The encoded image that a row of the sample table locates.

        Raises `SourceNotFoundError` when the file is gone, `ImageDecodeError` when it was truncated.
        """
        try:
            data = self.place.storage.read_range(path, offset, nbytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._gone(path) from error
        return self._unchanged(data, path, nbytes)

    @property
    def streams(self) -> bool:
        """Whether `stream` may give anything."""
        return False

    def stream(self, path: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """What these (offset, nbytes) of a file hold now, in order, as far as long reads serve and give."""
        return iter(())

    def _scan_units(self, workers: int) -> Iterator[Scanned]:
        units = iter(self.units())
        pool: Executor
        if self.is_local:
            start = time.monotonic()
            for unit in units:
                yield self.scan_unit(unit)
                if workers > 1 and time.monotonic() - start >= _SECONDS_ALONE:
                    break
            else:
                return
            pool = ProcessPoolExecutor(workers, get_context("spawn"))  # fork copies locks of other threads
        else:  # reading is waiting, not work; and a process would not see memory:// files
            workers = _REMOTE_THREADS
            pool = ThreadPoolExecutor(workers)
        with pool:
            yield from ordered_map(pool, self.scan_unit, units, workers * _UNITS_AHEAD_PER_WORKER)

    def _is_container(self, path: str) -> bool:
        return splitext(path)[1].lower() == self.container and not basename(path).startswith("._")

    def _containers(self) -> Iterator[tuple[str, int]]:
        """(path, bytes) of the tars or Parquet files of this place."""
        for path, nbytes in self.place.files():
            if self._is_container(path):
                if problem := name_problem(path):
                    raise SourceError(f"{printable(path)} cannot be read.", got=problem, do="rename the file")
                yield path, nbytes

    def _unchanged(self, data: bytes | None, path: str, nbytes: int) -> bytes:
        if data is None or len(data) != nbytes:
            length = "nothing" if data is None else f"{len(data):,} bytes"
            raise ImageDecodeError(f"{path} changed since it was scanned: {length} instead of {nbytes:,}")
        return data

    def _gone(self, path: str) -> SourceNotFoundError:
        return SourceNotFoundError(
            f"{path} is gone.",
            got=f"no such file under {self.location}",
            expected="the images that the cache was built from",
            do="check the mount, or name the images' new place",
        )

    def _empty(self, samples: pa.Table) -> EmptySourceError:
        if samples.num_rows:
            key, path, status = (samples[name][0].as_py() for name in ("key", "path", "status"))
            return EmptySourceError(
                f"None of the {samples.num_rows:,} images can be read.",
                got=f"{key} in {path}: {status}",
                expected="at least one JPEG, PNG, WebP, GIF, BMP or TIFF image",
                do="try to open some of them with an image viewer",
            )
        names = list(islice(self.names(), _NAMES_LOOKED_AT))
        return no_image_error(self.location, names, f"no image for a source of kind {self.kind}")


class SampleRows:
    """Collects the rows of one unit, and counts what it leaves out, by kind."""

    def __init__(self) -> None:
        self.left_out = Counter[str]()
        self._columns: dict[str, list[Any]] = {name: [] for name in _UNIT_SCHEMA.names}

    def add(
        self,
        key: str,
        qualified_key: str,
        path: str,
        offset: int,
        nbytes: int,
        label: str | None,
        read_first: Callable[[int], bytes],
    ) -> None:
        """One image. `read_first(n)` gives its first n bytes."""
        head, size = b"", (0, 0)
        status = name_problem(qualified_key) or name_problem(key) or OK
        if status == OK:
            try:
                head = read_first(min(nbytes, HEAD_BYTES))
                size = probe_size(head, nbytes, partial(read_first, nbytes))
            except ImageDecodeError as error:
                status = error.problem
            except (FileNotFoundError, PermissionError) as error:
                status = f"cannot be read: {error.strerror}"
        else:
            key, qualified_key = printable(key), printable(qualified_key)
            path = printable(path) if name_problem(path) else path
        head_hash = xxhash.xxh3_64_intdigest(head)
        self._append(key, path, offset, nbytes, *size, label, status, head_hash, qualified_key)

    def reject(self, path: str, offset: int, nbytes: int, status: str, name: str = "") -> None:
        """A place in a file without a usable image; its key is `name`, or else the place."""
        key = (printable(name) if name_problem(name) else name) or f"{path}#{offset}"
        self._append(key, path, offset, nbytes, 0, 0, None, status, xxhash.xxh3_64_intdigest(b""), key)

    def label(self, labels: Mapping[str, str | None]) -> int:
        """Label images without a label from `labels`, by key; returns how many `labels` have an image."""
        keys, column = self._columns["key"], self._columns["label"]
        column[:] = [
            labels.get(key) if label is None else label for key, label in zip(keys, column, strict=True)
        ]
        return len(labels.keys() & set(keys))

    def scanned(self) -> Scanned:
        return pa.table(self._columns, schema=_UNIT_SCHEMA), +self.left_out

    def _append(self, *values: object) -> None:
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)


def is_image_name(name: str) -> bool:
    """Decides by the suffix; the hidden `._a.jpg` that macOS puts next to `a.jpg` is not an image."""
    return splitext(name)[1].lower() in IMAGE_SUFFIXES and not basename(name).startswith(".")


def file_kind(name: str) -> str:
    return "hidden" if "/." in f"/{name}" else printable(splitext(name)[1].lower()) or "without suffix"


def left_out_line(num_images: int, left_out: Counter[str]) -> str | None:
    """One line about what a scan left out; None where it left out nothing."""
    if not left_out:
        return None
    named = left_out.most_common(_KINDS_NAMED)
    kinds = [f"{count:,} × {kind}" for kind, count in named]
    if rest := left_out.total() - sum(count for _, count in named):
        kinds.append(f"{rest:,} of other kinds")
    return f"Images in the source: {num_images:,}. Left out: {left_out.total():,} ({', '.join(kinds)})."


def no_image_error(location: str, names: Iterable[str], problem: str) -> EmptySourceError:
    suffixes = Counter(splitext(name)[1].lower() or "no suffix" for name in names)
    counts = ", ".join(f"{count:,} × {suffix}" for suffix, count in suffixes.most_common(5))
    return EmptySourceError(
        f"There is {problem}.",
        got=f"{location} with {counts or 'no file at all'}",
        expected=f"names that end in {', '.join(IMAGE_SUFFIXES)}, in any case: files, or members of tars",
        do="check the path; convert other formats first",
    )
