"""One vector per labelled image: a student's features, or a teacher's features from a cache.

As in DINOv2's linear classifiers, class tokens are concatenated with the means of the patch tokens.

B  images     N  patch tokens     D  width of the stem     C  width of a teacher
F  numbers of one vector
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, RecipeError
from teachercache.pipeline.grids import mean_token
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.sources import Source, decode_image
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.stores.feature_store import CLS_TOKEN
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.kpu.model import KPU
from teachercache.student.measuring.evaluate import in_threads
from teachercache.student.models.student import Student
from teachercache.student.sak.model import SAK

Tokens = Literal["cls", "mean"]


class ImageFeatures(Protocol):
    """The labels and features of images, by number from 0 to len(labels) - 1."""

    @property
    def width(self) -> int: ...

    @property
    def labels(self) -> Sequence[str | None]: ...

    def read(self, numbers: Sequence[int]) -> Tensor:
        """(len(numbers), `width`) float32, on the CPU."""


class CachedTeacherFeatures:
    """A teacher's last level, for the first view of every sample that the cache holds.

    `tokens`: "cls" reads only stored class tokens, "mean" averages the patch tokens, which an adjoint grid
    keeps exactly. None: both, if the cache has class tokens. `images`: hashes of their first bytes.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teacher: str,
        tokens: Tokens | None = None,
        batch_size: int = 16,
        threads: int = 2,
    ) -> None:
        self.cache, self.teacher = cache, teacher
        cache.check_teachers([teacher])
        self.spec = cache.spec.teachers[teacher]
        self._kinds: tuple[Tokens, ...] = (tokens,) if tokens else ("cls", "mean")
        if tokens is None and not self.spec.cls_token:
            self._kinds = ("mean",)
        self.width = self.spec.width * len(self._kinds)
        self._samples = cache.valid_samples([teacher])
        self.labels: list[str | None] = cache.samples["label"].take(self._samples).to_pylist()
        self.images: set[int] = set(cache.samples["head_hash"].take(self._samples).to_pylist())
        self._batch_size, self._threads = batch_size, threads

    def read(self, numbers: Sequence[int]) -> Tensor:
        starts = range(0, len(numbers), self._batch_size)
        vectors = torch.empty(len(numbers), self.width)

        def make(start: int) -> None:
            part = slice(start, start + self._batch_size)
            rows = self.cache.index.rows(self._samples[list(numbers[part])], 0)
            vectors[part] = torch.cat([self._vectors(rows, kind) for kind in self._kinds], dim=1)

        for _ in in_threads(make, starts, 1, self._threads):
            pass
        return vectors

    def _vectors(self, rows: ArrayLike, kind: Tokens) -> Tensor:
        if kind == "cls":
            return self.cache.read_tokens(rows, self.teacher, CLS_TOKEN)[:, -1].float()
        encoded = self.cache.read(rows, [self.teacher])[self.teacher]
        tokens_BNC = encoded.decode()[:, -1].flatten(1, 2).float()
        return mean_token(tokens_BNC, self.spec)


def require_same_teacher(one: CachedTeacherFeatures, other: CachedTeacherFeatures) -> None:
    """Raises `CacheMismatchError` if two caches hold different teachers under one name."""
    facts = ("model", "weights_hash", "image_size", "block_indices", "width")
    for fact in facts:
        mine, theirs = getattr(one.spec, fact), getattr(other.spec, fact)
        if mine != theirs:
            raise CacheMismatchError(
                f"Teacher {one.teacher} differs in the cache to test on.",
                got=f"{fact} {theirs}",
                expected=f"{fact} {mine}, as in the cache to train on",
                do="build both caches with the same recipe",
            )


def require_other_images(train: set[int], test: set[int]) -> None:
    """Raises `RecipeError` where all images to test on are also trained on, whatever they are called."""
    if test <= train:
        raise RecipeError(
            "A probe would be tested on what it is trained on.",
            got=f"{len(test):,} test images, all of them among the {len(train):,} training images",
            expected="images that were kept apart, such as the validation images of the data set",
            do="build a cache of those, or divide this one with `teachercache subset --keys`",
        )


class StudentFeatures:
    """The last level of each expert of a student: the stem's class token, and the means of the patch tokens
    of the stem and of every path; for a KPU, x and the mean of each map that is compared with teachers. The
    student sees `imagenet_eval` views of `image_size`, by default the size that it was trained on. Runs on
    the student's device.

    Raises `RecipeError` for a student that works on its teachers' features.
    """

    def __init__(
        self,
        student: Student,
        source: Source,
        image_size: Size | None = None,
        batch_size: int = 16,
        threads: int = 2,
    ) -> None:
        if not isinstance(student, SAK | KPU):
            raise RecipeError(
                "This student has no features of its own to probe.",
                got=f"a student of kind {student.kind}",
                expected="a student of kind sak or kpu",
                do="probe its teachers: pass their caches, and no student",
            )
        self.student = student.eval()
        self.size = image_size or student.image_size
        self.source = source
        samples = source.scan().drop_columns(["width", "height"]).to_pylist()
        self._samples = [sample for sample in samples if sample["status"] == OK]
        self.keys: list[str] = [sample["key"] for sample in self._samples]
        self.labels: list[str | None] = [sample["label"] for sample in self._samples]
        self.images: set[int] = {sample["head_hash"] for sample in self._samples}
        self._batch_size, self._threads = batch_size, threads
        if isinstance(student, KPU):
            parts = 1 + len(student.scales)
        else:
            parts = student.stem.has_class_token + len(student.experts)
        self.width = parts * student.stem.width

    @torch.no_grad()
    def read(self, numbers: Sequence[int]) -> Tensor:
        """Raises as `Source.read` and `decode_image` do if an image cannot be read."""
        student, vectors, start = self.student, torch.empty(len(numbers), self.width), 0
        student.stem.resize(self.size)
        for images in in_threads(self._image, numbers, self._batch_size, self._threads):
            pixels_B3HW = student.normalize(torch.stack(images).to(student.mean.device))
            vectors[start : start + len(images)] = self._vectors(pixels_B3HW).cpu()
            start += len(images)
        return vectors

    def _image(self, number: int) -> Tensor:
        sample = self._samples[number]
        image = decode_image(self.source.read(sample["path"], sample["offset"], sample["nbytes"]))
        policy = ViewPolicy(policy="imagenet_eval", size=self.size)
        return render_view(image, draw_view(policy, sample["key"], image.width, image.height, 0), self.size)

    def _vectors(self, pixels_B3HW: Tensor) -> Tensor:
        student = self.student
        if isinstance(student, KPU):
            image_BD, maps = student.features(pixels_B3HW)
            return torch.cat([image_BD, *(maps[i].mean((2, 3)) for i in student.scales)], dim=1)
        prefix, tokens_BND = student.stem.num_prefix_tokens, student.stem(pixels_B3HW)
        vectors_BD = [tokens_BND[-1][:, 0]] if student.stem.has_class_token else []
        vectors_BD.append(tokens_BND[-1][:, prefix:].mean(1))
        vectors_BD += [student.paths[name](tokens_BND, prefix)[-1].mean(1) for name in student.experts[1:]]
        return torch.cat(vectors_BD, dim=1)
