"""From views to stored features: teachers and codecs on their device, and a thread that writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from teachercache.cache_builder.decode import Renders
from teachercache.cache_builder.device_copies import DeviceCopies
from teachercache.cache_builder.stages import StageSeconds
from teachercache.cache_builder.teachers import Teacher
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import torch_dtype
from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.stores.feature_store import (
    CLS_TOKEN,
    GLOBAL_FEATURE,
    NORMS,
    ShardWriter,
    teacher_layouts,
)

_WRITES_IN_FLIGHT = 4


class Computing:
    """Teachers and codecs of a cache.

    One thread computes for all shards: OpenMP keeps a team of threads for each calling thread, and on a CPU
    two teams spin against each other.
    """

    def __init__(self, cache: FeatureCache, teachers: Mapping[str, Teacher]) -> None:
        self._cache, self._teachers = cache, dict(teachers)
        self._copies = {name: DeviceCopies(teacher) for name, teacher in teachers.items()}
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")

    def close(self) -> None:
        self._device.shutdown(cancel_futures=True)

    def encode(
        self, name: str, pixels: Mapping[Size, Tensor], seconds: StageSeconds
    ) -> tuple[dict[str, Tensor], FeatureMoments]:
        """The arrays to store for one batch of one teacher, and its statistics, on the teacher's device."""
        views = self._copies[name].start(pixels[self._cache.spec.teachers[name].render_size])
        return self._device.submit(self._compute, name, views, seconds).result()

    def _compute(
        self, name: str, views: Tensor, seconds: StageSeconds
    ) -> tuple[dict[str, Tensor], FeatureMoments]:
        copies, spec = self._copies[name], self._cache.spec.teachers[name]
        with torch.inference_mode():
            with seconds.stage("forward"):
                copies.wait(views)
                features = self._teachers[name](views)
                copies.synchronize()
            with seconds.stage("encode"):
                stored, norms_BS = stored_form(features.feature_maps_BSHWC, spec.grid)
                tensors = dict(self._cache.codec(name).encode(stored).tensors())
                if norms_BS is not None:
                    tensors[NORMS] = norms_BS
                tensors |= _tokens(spec, features.cls_token_BSC, features.global_feature_BD)
            with seconds.stage("statistics"):
                moments = FeatureMoments.of(features.feature_maps_BSHWC, self._cache.spec.covariance)
        return tensors, moments


def _tokens(spec: TeacherSpec, cls_token: Tensor | None, global_feature: Tensor | None) -> dict[str, Tensor]:
    """The token features in the layout's dtypes. Raises `CodecError` for values that do not fit."""
    layouts = teacher_layouts(spec)
    tokens: dict[str, Tensor] = {}
    for name, tensor in ((CLS_TOKEN, cls_token), (GLOBAL_FEATURE, global_feature)):
        if name not in layouts or tensor is None:
            continue
        tokens[name] = tensor.to(torch_dtype(layouts[name].dtype))
        if not torch.isfinite(tokens[name]).all():
            raise CodecError(
                f"The {name} feature of {spec.model} cannot be stored together with codec {spec.codec}.",
                got=f"a largest magnitude of {tensor.abs().max().item():g}",
                expected=f"finite values of at most {torch.finfo(tokens[name].dtype).max:g}",
                do="choose codec f32 if the values are finite; look at the teacher if they are not",
            )
    return tokens


class Batches:
    """Collects the views of one shard into batches, computes them, and writes them in another thread.

    `on_progress` is called whenever a teacher has finished a batch; an error that it raises ends the shard.
    """

    def __init__(
        self,
        computing: Computing,
        writers: Mapping[str, ShardWriter],
        batch_size: int,
        seconds: StageSeconds,
        on_progress: Callable[[], None],
    ) -> None:
        self._computing, self._writers, self._batch_size = computing, writers, batch_size
        self._seconds, self._on_progress = seconds, on_progress
        self.moments: dict[str, FeatureMoments] = {}
        self._offsets: list[int] = []
        self._renders: list[Renders] = []
        self._writes: deque[Future[None]] = deque()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._writing.shutdown(cancel_futures=True)

    def add(self, offset: int, renders: Renders) -> None:
        """Add the view of the row at `offset` within the shard."""
        self._offsets.append(offset)
        self._renders.append(renders)
        if len(self._offsets) == self._batch_size:
            self._run()

    def finish(self) -> None:
        if self._offsets:
            self._run()
        while self._writes:
            self._writes.popleft().result()

    def _run(self) -> None:
        pixels = {
            size: torch.stack([renders[size] for renders in self._renders]) for size in self._renders[0]
        }
        for name, writer in self._writers.items():
            tensors, moments = self._computing.encode(name, pixels, self._seconds)
            before = self.moments.get(name)
            self.moments[name] = moments if before is None else before.merge(moments)
            self._on_progress()
            while len(self._writes) >= _WRITES_IN_FLIGHT:
                self._writes.popleft().result()
            self._writes.append(self._writing.submit(self._write, writer, self._offsets, tensors))
        self._offsets, self._renders = [], []

    def _write(self, writer: ShardWriter, offsets: list[int], tensors: dict[str, Tensor]) -> None:
        with self._seconds.stage("write"):
            writer.write(offsets, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})
