"""Ways to read the same rows: ours, the raw bytes, and other libraries with the formats they bring.

Each takes a `Workload`, makes its copy of the rows if it needs one, and gives an iterator without end:
every `next()` is one batch of random rows, by array, in the workload's buffers (those of zarr-python and of
the loaders in memory of their own). Libraries that may be missing are imported inside.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as once
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Encoded
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.stores.shard_format import index_nbytes, parse_index
from teachercache.pipeline.stores.zarr_store import array_folder, shard_file

TAR = "Theia-style tar (in order)"
THREADS = "threads that pread, as SPDL's"
_THREADS = 4
COPY_NBYTES = 1 << 26  # of each file of a copy

Ints = NDArray[np.int64]
Arrays = Mapping[str, NDArray | Tensor]


@dataclass(frozen=True)
class Workload:
    """`rows` of one teacher, read in batches of `batch_size`; `buffers` hold one batch."""

    cache: FeatureCache
    teacher: str
    rows: Ints
    batch_size: int
    buffers: dict[str, Encoded]
    folder: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.buffers[self.teacher].arrays

    @property
    def arrays(self) -> dict[str, NDArray]:
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}

    @property
    def batch_nbytes(self) -> int:
        return self.buffers[self.teacher].nbytes

    @property
    def batches_per_pass(self) -> int:
        return len(self.rows) // self.batch_size

    def orders(self) -> Iterator[Ints]:
        """Positions in `rows`, a batch at a time: one random order of all of them behind the other."""
        for seed in count():
            order = np.random.default_rng(seed).permutation(len(self.rows))
            yield from order[: self.batches_per_pass * self.batch_size].reshape(-1, self.batch_size)

    def samples(self) -> Iterator[dict[str, Tensor]]:
        """Every row by itself, to make copies in other formats."""
        for row in self.rows:
            yield {
                name: t[0] for name, t in self.cache.read([row], [self.teacher])[self.teacher].arrays.items()
            }


Reader = Callable[[Workload], Iterator[Arrays]]


def ours(w: Workload) -> Iterator[Arrays]:
    for order in w.orders():
        yield w.cache.read(w.rows[order], [w.teacher], out=w.buffers)[w.teacher].arrays


def ours_checked(w: Workload) -> Iterator[Arrays]:
    cache = FeatureCache.open(w.cache.storage.url, checksums=True)
    for order in w.orders():
        yield cache.read(w.rows[order], [w.teacher], out=w.buffers)[w.teacher].arrays


class Unquestioning(FeatureCache):
    """Takes every file for the one that was committed, as a reader without the default check would."""

    def __init__(self, *opened: Any) -> None:
        super().__init__(*opened)
        for shards in self.shards.values():
            setattr(shards, "require_ends", shards.records)  # noqa: B010


def _first_touches(w: Workload, kind: type[FeatureCache]) -> Iterator[Arrays]:
    """Every pass in a cache that was just opened: each shard is opened, and looked at, anew."""
    for number, order in enumerate(w.orders()):
        if number % w.batches_per_pass == 0:
            cache = kind.open(w.cache.storage.url)
        yield cache.read(w.rows[order], [w.teacher], out=w.buffers)[w.teacher].arrays


def first_touch(w: Workload) -> Iterator[Arrays]:
    return _first_touches(w, FeatureCache)


def first_touch_unquestioning(w: Workload) -> Iterator[Arrays]:
    return _first_touches(w, Unquestioning)


def raw_pread(
    w: Workload, read: Callable[..., object] = lambda file, into, offset: os.preadv(file, [into], offset)
) -> Iterator[Arrays]:
    """The system calls alone: files open, places known, memory at hand."""
    places = {name: _places(w, name, values.ndim - 1) for name, values in w.arrays.items()}
    chunks = {name: [value.reshape(-1).view(np.uint8).data for value in w.arrays[name]] for name in places}
    for order in w.orders():
        for name, into in chunks.items():
            for chunk, position in zip(into, order.tolist(), strict=True):
                descriptor, offset = places[name][position]
                read(descriptor, chunk, offset)
        yield w.tensors


def raw_direct(w: Workload) -> Iterator[Arrays]:
    """Past the page cache: the pages that a row is in, into memory of whole pages, and the row from there."""
    page, pages = mmap.PAGESIZE, mmap.mmap(-1, w.batch_nbytes + 2 * mmap.PAGESIZE)
    direct = once(lambda file: os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT))

    def read(descriptor: int, into: memoryview, offset: int) -> None:
        first, start = offset // page * page, offset % page
        end = -(-(start + len(into)) // page) * page
        os.preadv(direct(descriptor), [memoryview(pages)[:end]], first)
        into[:] = memoryview(pages)[start : start + len(into)]

    return raw_pread(w, read)


def _places(w: Workload, name: str, row_ndim: int) -> list[tuple[int, int]]:
    """(file descriptor, offset) of every row in one array."""
    num_rows = w.cache.spec.rows_per_shard
    files: dict[int, tuple[int, Ints]] = {}
    for shard in np.unique(w.rows // num_rows).tolist():
        path = Path(w.cache.storage.url, shard_file(w.teacher, name, shard, row_ndim))
        descriptor, nbytes, end = os.open(path, os.O_RDONLY), path.stat().st_size, index_nbytes(num_rows)
        index = parse_index(os.pread(descriptor, end, nbytes - end), num_rows, nbytes)
        files[shard] = descriptor, index[:, 0].astype(np.int64)
    shards, places = (part.tolist() for part in np.divmod(w.rows, num_rows))
    return [
        (files[shard][0], int(files[shard][1][place])) for shard, place in zip(shards, places, strict=True)
    ]


def zarr_python(w: Workload) -> Iterator[Arrays]:
    """A batch as zarr-python gives it: rows stacked. (A list of rows takes some hundred times as long.)"""
    arrays = _zarr_arrays(w)
    for order in w.orders():
        rows = w.rows[order].tolist()
        yield {name: np.stack([array[row] for row in rows]) for name, array in arrays.items()}


def zarr_python_copied(w: Workload) -> Iterator[Arrays]:
    """Its rows copied into the buffers one by one, where malloc gives each the memory of the last."""
    arrays, buffers = _zarr_arrays(w), w.arrays
    for order in w.orders():
        for name, array in arrays.items():
            for number, row in enumerate(w.rows[order].tolist()):
                buffers[name][number] = array[row]
        yield buffers


def _zarr_arrays(w: Workload) -> dict[str, Any]:
    folders = {name: f"{w.cache.storage.url}/{array_folder(w.teacher, name)}" for name in w.tensors}
    return {name: zarr.open_array(folder, mode="r") for name, folder in folders.items()}


def zarrs(w: Workload) -> Iterator[Arrays]:
    """zarr-python with the codec pipeline of zarrs, in Rust."""
    import_module("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        arrays = _zarr_arrays(w)
    for order in w.orders():
        rows = w.rows[order].tolist()
        yield {name: np.stack([array[row] for row in rows]) for name, array in arrays.items()}


def threads(w: Workload) -> Iterator[Arrays]:
    """As SPDL does: a pool of threads reads the rows of a batch, while the one before is used."""
    places = {name: _places(w, name, values.ndim - 1) for name, values in w.arrays.items()}
    sets = [{name: np.empty_like(values) for name, values in w.arrays.items()} for _ in range(2)]

    def read(row: NDArray, place: tuple[int, int]) -> None:
        os.preadv(place[0], [row.reshape(-1).view(np.uint8).data], place[1])

    with ThreadPoolExecutor(_THREADS) as pool:
        pending: deque[tuple[Arrays, list[Future[None]]]] = deque()
        for number, order in enumerate(w.orders()):
            into = sets[number % 2]
            rows = [(into[n][i], places[n][at]) for n in places for i, at in enumerate(order.tolist())]
            pending.append((into, [pool.submit(read, *row) for row in rows]))
            if len(pending) == 2:
                batch, reads = pending.popleft()
                for each in reads:
                    each.result()
                yield batch


def lance(w: Workload) -> Iterator[Arrays]:
    """A column of bytes for each array; rows are taken by number."""
    library = import_module("lance")
    folder, names = _folder(w, "lance"), list(w.tensors)
    columns = {name: [one[name].numpy().tobytes() for one in w.samples()] for name in names}
    sizes = {name: pa.binary(len(values[0])) for name, values in columns.items()}
    library.write_dataset(
        pa.table({name: pa.array(values, sizes[name]) for name, values in columns.items()}), folder / "rows"
    )
    dataset, buffers = library.dataset(folder / "rows"), w.arrays
    for order in w.orders():
        table = dataset.take(order.tolist())
        for name, buffer in buffers.items():
            for number, value in enumerate(table[name]):
                buffer[number] = np.frombuffer(value.as_buffer(), buffer.dtype).reshape(buffer.shape[1:])
        yield buffers


def kvikio(w: Workload) -> Iterator[Arrays]:
    """Into a GPU's memory, by GPUDirect Storage where the file system has it."""
    library, device = import_module("kvikio"), "cuda"
    if not torch.cuda.is_available():
        raise ImportError("KvikIO reads into a GPU.", name="a GPU")
    places = {name: _places(w, name, values.ndim - 1) for name, values in w.arrays.items()}
    files: dict[int, Any] = {}
    there = {name: torch.empty_like(tensor, device=device) for name, tensor in w.tensors.items()}
    for order in w.orders():
        pending = []
        for name, rows in there.items():
            for row, position in zip(rows, order.tolist(), strict=True):
                descriptor, offset = places[name][position]
                if descriptor not in files:
                    files[descriptor] = library.CuFile(Path(f"/proc/self/fd/{descriptor}").readlink())
                pending.append(files[descriptor].pread(row, row.nbytes, offset))
        for future in pending:
            future.get()
        yield there


def tensorstore(w: Workload) -> Iterator[Arrays]:
    ts = import_module("tensorstore")
    arrays = {}
    for name in w.tensors:
        path = f"{w.cache.storage.url}/{array_folder(w.teacher, name)}"
        arrays[name] = ts.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, read=True
        ).result()
    buffers = {name: ts.array(values, copy=False, write=True) for name, values in w.arrays.items()}
    for order in w.orders():
        pending = [buffers[name].write(array[w.rows[order]]) for name, array in arrays.items()]
        for future in pending:
            future.result()
        yield w.tensors


def theia_tar(w: Workload) -> Iterator[Arrays]:
    """As Theia writes and reads its features: one safetensors a row in a tar, read from front to back."""
    import webdataset as wds
    from safetensors.torch import load, save

    folder = _folder(w, "tar")
    with wds.ShardWriter(f"{folder}/%06d.tar", maxsize=COPY_NBYTES, verbose=0) as writer:
        for number, sample in enumerate(w.samples()):
            writer.write({"__key__": f"{number:09d}", "teacher.safetensors": save(sample)})

    def decode(key: str, data: bytes) -> object:
        return load(data) if key.endswith(".safetensors") else data

    paths = [str(path) for path in sorted(folder.iterdir())]
    dataset = wds.WebDataset(paths, shardshuffle=False).decode(decode).repeat()
    rows = (sample["teacher.safetensors"] for sample in dataset)
    while True:
        yield _copy_rows(w, rows)


def litdata(w: Workload) -> Iterator[Arrays]:
    streaming = import_module("litdata.streaming")
    folder = _folder(w, "litdata")
    writer = streaming.writer.BinaryWriter(str(folder), chunk_bytes=COPY_NBYTES)
    for number, sample in enumerate(w.samples()):
        writer.add_item(number, {name: tensor.numpy() for name, tensor in sample.items()})
    writer.done()
    writer.merge(1)
    dataset = streaming.StreamingDataset(str(folder))
    for order in w.orders():
        yield _copy_rows(w, (dataset[position] for position in order.tolist()))


def mosaic_mds(w: Workload) -> Iterator[Arrays]:
    streaming = import_module("streaming")
    folder = _folder(w, "mds")
    columns = {
        name: f"ndarray:{values.dtype}:{','.join(map(str, values.shape[1:]))}"
        for name, values in w.arrays.items()
    }
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=COPY_NBYTES) as writer:
        for sample in w.samples():
            writer.write({name: tensor.numpy() for name, tensor in sample.items()})
    dataset = streaming.LocalDataset(str(folder))
    for order in w.orders():
        yield _copy_rows(w, (dataset[position] for position in order.tolist()))


def _folder(w: Workload, name: str) -> Path:
    folder = w.folder / name
    folder.mkdir()
    return folder


def _copy_rows(w: Workload, rows: Iterator[Arrays]) -> Arrays:
    buffers = w.arrays
    for number, sample in zip(range(w.batch_size), rows, strict=False):
        for name, buffer in buffers.items():
            buffer[number] = np.asarray(sample[name])
    return buffers


class WorkloadSampler:
    """The workload's batches, for `FeatureLoader`."""

    def __init__(self, w: Workload) -> None:
        self.batch_size_per_process = w.batch_size
        self._rows = w.rows
        self._orders = w.orders()

    def batch(self, step: int) -> Ints:
        return self._rows[next(self._orders)]

    def epochs(self, step: int) -> Ints:
        return np.zeros(self.batch_size_per_process, np.int64)


def feature_loader(w: Workload) -> Iterator[Arrays]:
    with FeatureLoader(w.cache, WorkloadSampler(w), [w.teacher], images=False) as loader:
        for batch in loader:
            yield batch.features[w.teacher].arrays


class CachedRows(Dataset):
    """What one would write first: a map-style dataset over the cache."""

    def __init__(self, cache: FeatureCache, teacher: str) -> None:
        self._cache, self._teacher = cache, teacher

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        encoded = self._cache.read([row], [self._teacher])[self._teacher]
        return {name: tensor[0] for name, tensor in encoded.arrays.items()}


class _Batches:
    def __init__(self, w: Workload) -> None:
        self._w = w

    def __iter__(self) -> Iterator[list[int]]:
        return (self._w.rows[order].tolist() for order in self._w.orders())


def data_loader(w: Workload) -> Iterator[Arrays]:
    """torch's, with two worker processes (new ones, since this process has threads)."""
    yield from DataLoader(
        CachedRows(w.cache, w.teacher),
        batch_sampler=_Batches(w),
        num_workers=2,
        multiprocessing_context="spawn",
    )


READERS: dict[str, Reader] = {
    "raw pread": raw_pread,
    "raw pread, O_DIRECT": raw_direct,
    "ours": ours,
    "ours, checksums": ours_checked,
    "ours, opened anew each pass": first_touch,
    "ours, opened anew, default check off": first_touch_unquestioning,
    THREADS: threads,
    "tensorstore": tensorstore,
    "zarrs": zarrs,
    "Lance": lance,
    "KvikIO, to a GPU": kvikio,
    "zarr-python": zarr_python,
    "zarr-python, rows copied": zarr_python_copied,
    "litdata": litdata,
    "MDS": mosaic_mds,
    TAR: theia_tar,
}
LOADERS: dict[str, Reader] = {
    "ours, FeatureLoader": feature_loader,
    "torch DataLoader, 2 workers": data_loader,
}
