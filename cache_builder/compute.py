"""From views to stored features: teachers and codecs on their device, and a thread that writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from teachercache.cache_builder.decode import Slot
from teachercache.cache_builder.progress import StageSeconds
from teachercache.cache_builder.teachers import Teacher
from teachercache.cache_builder.teachers.registry import passes
from teachercache.cache_builder.teachers.teacher import TeacherFeatures
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Codec, Encoded, torch_dtype
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.spec import IMAGES, GridSpec, TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.stores.feature_store import (
    CLS_TOKEN,
    GLOBAL_FEATURE,
    NORMS,
    PIXELS,
    ShardWriter,
    teacher_layouts,
)

_WRITES_IN_FLIGHT = 4


@dataclass(frozen=True)
class Computed:
    """What to store, and whether the codec can hold it, once it has `arrived`; statistics, on the device."""

    codec: Codec
    tensors: dict[str, Tensor]
    finite: Tensor
    moments: FeatureMoments
    arrived: Callable[[], object] = lambda: None

    def arrays(self) -> dict[str, NDArray]:
        """Waits for the copies. Raises `CodecError` where the codec cannot hold the features."""
        self.arrived()
        if not self.finite:
            raise self.codec.not_finite()
        for name in self.tensors.keys() & {CLS_TOKEN, GLOBAL_FEATURE}:
            if not self.tensors[name].isfinite().all():
                raise self.codec.not_finite(f"{name} features")
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class DeviceCopies:
    """On a GPU, copies run on a stream of their own: the next batch arrives while this one is computed.

    The thread that renders a batch calls `start`; the one that computes it calls `wait` and `synchronize`.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._device = next(teacher.parameters()).device
        self.on_gpu = self._device.type == "cuda"
        streams = [torch.cuda.Stream(self._device) if self.on_gpu else None for _ in range(2)]
        self._stream, self._back = streams

    def start(self, views: Tensor) -> Tensor:
        """`views` on the device, perhaps still being copied; use them after `wait`."""
        if self._stream is None:
            return views.to(self._device)
        with torch.cuda.stream(self._stream):
            return views.pin_memory().to(self._device, non_blocking=True)

    def wait(self, views: Tensor) -> None:
        """Order everything that this thread computes from now on after the copy of `views`."""
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            views.record_stream(computing)

    def synchronize(self) -> None:
        """Wait until this thread's computations are done, so that times are right."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def to_host(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], object]]:
        """The tensors on the host, once what is returned beside them was called, in whichever thread.

        They are copied behind what this thread has computed, and beside what it computes next, into
        page-locked memory, of which PyTorch keeps a ring.
        """
        if self._back is None:
            return dict(tensors), lambda: None
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.record_stream(self._back)
        return copies, self._back.record_event().synchronize


class Computing:
    """Teachers and codecs of a cache.

    One thread computes for all shards: OpenMP keeps a team of threads for each calling thread, and on a CPU
    two teams spin against each other.
    """

    def __init__(self, cache: FeatureCache, teachers: Mapping[str, Teacher]) -> None:
        self._cache, self._teachers = cache, dict(teachers)
        self._copies = {name: DeviceCopies(teacher) for name, teacher in teachers.items()}
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")

    def passes(self, names: Collection[str]) -> list[list[str]]:
        return passes({name: self._cache.spec.teachers[name] for name in names})

    def close(self) -> None:
        self._device.shutdown(cancel_futures=True)

    @property
    def on_gpu(self) -> bool:
        return any(copies.on_gpu for copies in self._copies.values())

    def views_of(self, name: str, pixels: Mapping[Size, Tensor]) -> Tensor:
        """What a teacher, or the student (name "images"), sees."""
        return pixels[self._cache.spec.render_size(name)]

    @cached_property
    def _compiled(self) -> tuple[Any, Any]:
        """`_encode` and `FeatureMoments.of`; a compiler takes seconds to import."""
        return torch.compile(_encode, dynamic=False), torch.compile(FeatureMoments.of, dynamic=False)

    def encode(
        self, names: Sequence[str], pixels: Mapping[Size, Tensor], seconds: StageSeconds
    ) -> dict[str, Computed]:
        """What to store of one batch of the teachers of one pass (`passes`), on the first one's device."""
        views = self._copies[names[0]].start(self.views_of(names[0], pixels))
        return self._device.submit(self._compute, names, views, seconds).result()

    def _compute(self, names: Sequence[str], views: Tensor, seconds: StageSeconds) -> dict[str, Computed]:
        copies, teacher = self._copies[names[0]], self._teachers[names[0]]
        with torch.inference_mode(), seconds.stage("forward"):
            copies.wait(views)
            features = teacher.together(views, [self._teachers[name].spec for name in names])
            copies.synchronize()
        is_compiled = len(views) == teacher.compiled_for  # what is left of a shard would be compiled anew
        return {
            name: self._stored(name, one, is_compiled, seconds)
            for name, one in zip(names, features, strict=True)
        }

    def _stored(
        self, name: str, features: TeacherFeatures, is_compiled: bool, seconds: StageSeconds
    ) -> Computed:
        spec, codec = self._cache.spec.teachers[name], self._cache.codec(name)
        encode, moments_of = self._compiled if is_compiled else (_encode, FeatureMoments.of)
        with torch.inference_mode():
            with seconds.stage("encode"):
                encoded, norms_BS = encode(features.feature_maps_BSHWC, codec, spec.grid)
                tensors = {**encoded.tensors(), **_tokens(spec, features)}
                if norms_BS is not None:
                    tensors[NORMS] = norms_BS
            with seconds.stage("statistics"):
                moments = moments_of(features.feature_maps_BSHWC, self._cache.spec.covariance)
            tensors["finite"] = torch.as_tensor(encoded.finite)
            copies, arrived = self._copies[name].to_host(tensors)
        finite = copies.pop("finite")
        return Computed(codec, copies, finite, moments, arrived)


def _encode(maps_BSHWC: Tensor, codec: Codec, grid: GridSpec) -> tuple[Encoded, Tensor | None]:
    stored, norms_BS = stored_form(maps_BSHWC, grid)
    return codec.encode_unchecked(stored), norms_BS


def _tokens(spec: TeacherSpec, features: TeacherFeatures) -> dict[str, Tensor]:
    """The token features in the layout's dtypes."""
    layouts = teacher_layouts(spec)
    tokens = {CLS_TOKEN: features.cls_token_BSC, GLOBAL_FEATURE: features.global_feature_BD}
    return {
        name: tensor.to(torch_dtype(layouts[name].dtype))
        for name, tensor in tokens.items()
        if name in layouts and tensor is not None
    }


class Batches:
    """Collects the views of one shard into batches, computes them, and writes them in another thread.

    `on_progress` is called whenever a teacher has finished a batch; an error that it raises ends the shard.
    """

    def __init__(
        self,
        computing: Computing,
        writers: Mapping[str, ShardWriter],
        seconds: StageSeconds,
        on_progress: Callable[[], None],
    ) -> None:
        self._computing, self._writers = computing, writers
        self._seconds, self._on_progress = seconds, on_progress
        self.moments: dict[str, FeatureMoments] = {}
        self._offsets: list[int] = []
        self._slots: list[Slot] = []
        self._writes: deque[Future[None]] = deque()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._writing.shutdown(cancel_futures=True)

    def add(self, offset: int, slot: Slot) -> None:
        """Add the view of the row at `offset` within the shard; slots come in order, some left out."""
        if self._slots and slot.memory is not self._slots[0].memory:
            self._run()
        self._offsets.append(offset)
        self._slots.append(slot)
        if slot.is_last:
            self._run()

    def finish(self) -> None:
        if self._offsets:
            self._run()
        while self._writes:
            self._writes.popleft().result()

    def _run(self) -> None:
        indices = [slot.index for slot in self._slots]
        whole = slice(len(indices)) if indices == list(range(len(indices))) else indices
        pixels = {size: views[whole] for size, views in self._slots[0].memory.items()}
        if IMAGES in self._writers:
            rendered = self._computing.views_of(IMAGES, pixels).numpy()
            self._submit(IMAGES, lambda: {PIXELS: rendered})
        for names in self._computing.passes([name for name in self._writers if name != IMAGES]):
            for name, computed in self._computing.encode(names, pixels, self._seconds).items():
                before = self.moments.get(name)
                self.moments[name] = computed.moments if before is None else before.merge(computed.moments)
                self._submit(name, computed.arrays)
        self._offsets, self._slots = [], []

    def _submit(self, name: str, arrays: Callable[[], dict[str, NDArray]]) -> None:
        """`arrays` gives what to write, in the thread that writes."""
        self._on_progress()
        while len(self._writes) >= _WRITES_IN_FLIGHT:
            self._writes.popleft().result()
        writer, offsets = self._writers[name], self._offsets

        def write() -> None:
            with self._seconds.stage("write"):
                writer.write(offsets, arrays())

        self._writes.append(self._writing.submit(write))
