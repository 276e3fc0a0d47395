"""Batches for training, made by threads of the training process itself.

Worker processes would copy every batch through shared memory, which caps any format near 1 GB/s;
JPEG decoding, resizing and file reads all release the GIL, so threads keep up, and they read and render
straight into the memory of the batch, which goes round.
Do not hand the loader to `accelerator.prepare()`: the sampler has already split the rows by rank.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache as once
from itertools import count
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Encoded, torch_dtype
from teachercache.pipeline.crops import StudentJitter, draw_jitter, draw_window
from teachercache.pipeline.errors import (
    ArgumentError,
    CacheError,
    ImageDecodeError,
    SourceError,
    TeacherCacheError,
)
from teachercache.pipeline.loading.batch_memory import BatchMemory, TensorLayout
from teachercache.pipeline.loading.streaming import StreamedRow, StreamSampler, TarStream
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.stores.feature_store import CLS_TOKEN, GLOBAL_FEATURE
from teachercache.pipeline.stores.webdataset_store import load_rows
from teachercache.pipeline.views import View, draw_view, render_view

_Streamed = Future[list[StreamedRow]] | None
_LABELS, _IMAGES = "labels/", "images/"  # no names of teachers


class Sampler(Protocol):
    """What the loader asks of a sampler; `ShardShuffleSampler` is the one to train with."""

    @property
    def batch_size_per_process(self) -> int: ...

    def batch(self, step: int) -> NDArray[np.int64]:
        """The rows of one batch; steps are asked for in order."""

    def epochs(self, step: int) -> NDArray[np.int64]:
        """The epoch that each of these rows is of."""


class LabelSource(Protocol):
    """What a data set says of its images; the loader moves it to the views and into the batch."""

    @property
    def layouts(self) -> Mapping[str, TensorLayout]:
        """The labels of one row, by task."""

    def read(self, sample_key: str, view: View) -> Mapping[str, Tensor]:
        """The labels of a sample as they lie on this view of it. Called from several threads."""


@dataclass
class Batch:
    """One process's part of a global batch (b rows).

    `images` are what the student sees, uint8 (b, 3, h, w): the windows of the views that begin at `windows`,
    (b, 2) rows and columns in pixels of the view, with the student's own jitter. `renders` are whole views by
    (h, w), and the `images` where these are that. `features` and `cls_tokens`, of whole views, are still
    encoded, on the CPU. `labels` by task, of the windows, where the loader was given some.
    `seconds`: `read` and `decode` are summed over threads, `wait` is what the consumer waited for.

    The loader makes a later batch in the same memory once this one and all views of its tensors are gone;
    until then nothing writes to them.
    """

    step: int
    rows: NDArray[np.int64]
    sample_keys: list[str]
    windows: NDArray[np.int64]
    images: Tensor
    renders: dict[Size, Tensor]
    features: dict[str, Encoded]
    cls_tokens: dict[str, Tensor]
    labels: dict[str, Tensor]
    seconds: dict[str, float]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with every tensor as `change` gives it, `images` once where they are a render, too."""
        changed = once(change)

        def all_of(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
            return {name: changed(tensor) for name, tensor in tensors.items()}

        return replace(
            self,
            images=changed(self.images),
            renders=all_of(self.renders),
            features={name: replace(one, arrays=all_of(one.arrays)) for name, one in self.features.items()},
            cls_tokens=all_of(self.cls_tokens),
            labels=all_of(self.labels),
        )


class _Pending(NamedTuple):
    """A batch under way, and by stage the tasks that fill its tensors and return their seconds."""

    batch: Batch
    tasks: dict[str, list[Future[float]]]


class FeatureLoader:
    """Endless iterator of `Batch`; a context manager that stops its threads. With a `StreamSampler` it reads
    tars from front to back, as that draws their rows.

    `features=False` leaves the cached features unread (training with online teachers), `images=False`
    the images; `extra_sizes` asks for renders at further sizes, such as the teachers' own; `labels` come
    along with the images. `fresh`: views are drawn anew at each epoch, instead of those of the cache.
    `jitter`: what is changed of the student's pixels alone; with one, they are rendered here, as fresh views
    are, whatever pixels the cache holds. `seed`: by which windows, fresh views and jitter
    are drawn. Memory for `prefetch` + 2 batches goes round, while
    the consumer holds one.
    """

    def __init__(
        self,
        cache: FeatureCache,
        sampler: Sampler,
        teachers: Sequence[str] | None = None,
        *,
        features: bool = True,
        images: bool = True,
        extra_sizes: Collection[Size] = (),
        labels: LabelSource | None = None,
        fresh: bool = False,
        jitter: StudentJitter | None = None,
        seed: int = 0,
        start_step: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if threads < 1 or prefetch < 0:
            raise ArgumentError(
                "A loader needs at least one thread, and prefetch cannot be negative.",
                got=f"threads={threads}, prefetch={prefetch}",
                expected="threads >= 1, prefetch >= 0",
            )
        self._cache = cache
        self._sampler = sampler
        self._teachers = cache.check_teachers(teachers) if features else []
        self._views, self._seed = cache.spec.views, seed
        self._images, self._labels = images, labels
        self._tasks = labels.layouts if labels and images else {}
        self._fresh, self._jitter = fresh, jitter
        self._sees_whole = images and not (self._views.margin or jitter)
        self._stored_pixels = cache.spec.images == "rendered" and not (fresh or jitter)
        own = {self._views.size} if self._sees_whole else set()
        self._sizes = sorted({*own, *extra_sizes}) if images else []
        self._steps = count(start_step)
        self._threads = threads
        self._prefetch = prefetch
        self._memory = BatchMemory(self._layouts(), pin_memory)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._stream: TarStream | None = None
        if isinstance(sampler, StreamSampler):
            self._stream = TarStream(cache, sampler, self._teachers, images, start_step)
        self._stream_thread = ThreadPoolExecutor(1, thread_name_prefix="loader-stream")
        self._pending: deque[_Pending] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream_thread.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.close()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        # Not `ordered_map`: a batch is many tasks in one memory, and one that failed or was interrupted stays
        # first for the next iterator, where a generator that raised is at its end.
        while True:
            while len(self._pending) <= self._prefetch:
                self._pending.append(self._submit(next(self._steps)))
            batch = self._collect(self._pending[0])
            self._pending.popleft()
            yield batch

    def _layouts(self) -> dict[Hashable, TensorLayout]:
        """The tensors of a batch: renders by their size, arrays by (teacher, array)."""
        num_rows = self._sampler.batch_size_per_process
        layouts: dict[Hashable, TensorLayout] = {
            size: ((num_rows, 3, *size), torch.uint8) for size in self._sizes
        }
        num_windows = num_rows if self._images and not self._sees_whole else 0
        layouts[_IMAGES] = (num_windows, 3, *self._views.size), torch.uint8
        for task, (shape, dtype) in self._tasks.items():
            layouts[_LABELS, task] = (num_rows, *shape), dtype
        for teacher in self._teachers:
            for array, layout in self._cache.layouts(teacher).items():
                if array != GLOBAL_FEATURE:
                    layouts[teacher, array] = (num_rows, *layout.shape), torch_dtype(layout.dtype)
        return layouts

    def _submit(self, step: int) -> _Pending:
        rows = self._sampler.batch(step)
        samples, _, lines = self._cache.index.locate(rows)
        keys = [self._cache.key(sample) for sample in samples.tolist()]
        epochs = self._sampler.epochs(step).tolist()
        tensors = self._memory.take()
        with_cls = [name for name in self._teachers if (name, CLS_TOKEN) in tensors]

        def arrays(teacher: str) -> dict[str, Tensor]:
            return {array: tensors[teacher, array] for array in self._cache.features[teacher].feature_layouts}

        batch = Batch(
            step=step,
            rows=rows,
            sample_keys=keys,
            windows=np.array(
                [draw_window(self._views, self._seed, *at) for at in zip(keys, epochs, strict=True)]
            ),
            images=tensors[self._views.size if self._sees_whole else _IMAGES],
            renders={size: tensors[size] for size in self._sizes},
            features={name: Encoded(self._cache.codec(name), arrays(name)) for name in self._teachers},
            cls_tokens={name: tensors[name, CLS_TOKEN] for name in with_cls},
            labels={task: tensors[_LABELS, task] for task in self._tasks},
            seconds={},
        )
        streamed = None
        if self._stream is not None:
            streamed = self._stream_thread.submit(self._stream.take, rows)
        step_rows = -(-len(rows) // self._threads)
        parts = [slice(start, start + step_rows) for start in range(0, len(rows), step_rows)]
        reads = [
            self._pool.submit(self._read, batch, teacher, part, streamed)
            for teacher in self._teachers
            for part in parts
        ]
        renders = [
            self._pool.submit(self._render, batch, i, *place, streamed)
            for i, place in enumerate(zip(samples.tolist(), lines.tolist(), epochs, strict=True))
            if self._images
        ]
        return _Pending(batch, {"read": reads, "decode": renders})

    def _read(self, batch: Batch, teacher: str, part: slice, streamed: _Streamed) -> float:
        start, rows, encoded = time.perf_counter(), batch.rows[part], batch.features[teacher]
        into = Encoded(encoded.codec, {name: tensor[part] for name, tensor in encoded.arrays.items()})
        tokens = {CLS_TOKEN: batch.cls_tokens[teacher][part]} if teacher in batch.cls_tokens else {}
        try:
            if streamed:
                files = (row[teacher] for row in streamed.result()[part])
                load_rows(files, {name: array.numpy() for name, array in (into.arrays | tokens).items()})
            else:
                self._cache.read(rows, [teacher], out={teacher: into})
                for name, out in tokens.items():
                    self._cache.read_tokens(rows, teacher, name, out=out)
        except TeacherCacheError:
            raise
        except Exception as error:  # a thread's own traceback says nothing of what it was at
            shards = np.unique(rows // self._cache.spec.rows_per_shard).tolist()
            raise CacheError(
                f"Features of teacher {teacher} cannot be read.",
                got=f"{type(error).__name__}: {error}, in shard {', '.join(map(str, shards))}",
                expected="shards as they were committed",
                do=f"run: teachercache verify {self._cache.storage.url} --full",
            ) from error
        return time.perf_counter() - start

    def _render(self, batch: Batch, i: int, sample: int, line: int, epoch: int, streamed: _Streamed) -> float:
        start = time.perf_counter()
        try:
            view = self._fresh_view(sample, epoch) if self._fresh else self._cache.views.view(line)
            self._render_sample(batch, i, once(lambda: self._image(sample, i, streamed)), view, epoch)
        except Exception as error:
            if isinstance(error, TeacherCacheError) and not isinstance(error, ImageDecodeError):
                raise
            kind = ImageDecodeError if isinstance(error, ImageDecodeError) else SourceError
            raise kind(
                f"Sample {batch.sample_keys[i]} cannot be trained on.",
                got=f"{type(error).__name__}: {error}",
                expected=f"the image {self._cache.samples['path'][sample]} as the cache was built from it"
                + (", and its labels" if self._labels else ""),
                do="put back what was changed since, and run the same command again",
            ) from error
        return time.perf_counter() - start

    def _fresh_view(self, sample: int, epoch: int) -> View:
        width, height = (self._cache.samples[name][sample].as_py() for name in ("width", "height"))
        policy = self._views.model_copy(update={"seed": self._seed, "flip": "random"})
        return draw_view(policy, self._cache.key(sample), width, height, epoch)

    def _image(self, sample: int, i: int, streamed: _Streamed) -> Image.Image:
        if streamed and (data := streamed.result()[i].get(IMAGES)):
            self._cache.images.require_cached(sample, data)
        else:
            data = self._cache.image_bytes(sample)
        return decode_image(data)

    def _render_sample(
        self, batch: Batch, i: int, image: Callable[[], Image.Image], view: View, epoch: int
    ) -> None:
        for size, pixels in batch.renders.items():
            if self._stored_pixels and size == view.size:
                self._cache.pixels(batch.rows[i], pixels[i : i + 1])
            else:
                render_view(image(), view, size, out=pixels[i])
        (top, left), (height, width) = batch.windows[i].tolist(), self._views.size
        seen = view.window((top, left), (height, width))
        if self._jitter:
            seen = seen.jittered(*draw_jitter(self._jitter, self._seed, batch.sample_keys[i], epoch))
        if self._stored_pixels and not self._sees_whole:
            whole = self._cache.pixels(batch.rows[i])[0]
            batch.images[i] = whole[:, top : top + height, left : left + width]
        elif not self._sees_whole:
            render_view(image(), seen, out=batch.images[i])
        if self._labels:
            for task, values in self._labels.read(batch.sample_keys[i], seen).items():
                batch.labels[task][i] = values

    def _collect(self, pending: _Pending) -> Batch:
        start = time.perf_counter()
        seconds = {stage: sum(task.result() for task in tasks) for stage, tasks in pending.tasks.items()}
        pending.batch.seconds = seconds | {"wait": time.perf_counter() - start}
        return pending.batch
