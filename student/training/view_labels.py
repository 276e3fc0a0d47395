"""Labels of a data set on the views of a cache, for `FeatureLoader`."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, RecipeError, require_known
from teachercache.pipeline.loading.batch_memory import TensorLayout
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.sources.decode import HEAD_BYTES
from teachercache.pipeline.views import View
from teachercache.student.datasets import dataset_class, open_dataset
from teachercache.student.datasets.labels import render_labels
from teachercache.student.training.train_recipe import MultiTaskRecipe


def task_channels(recipe: MultiTaskRecipe) -> dict[str, int]:
    """Name → output channels of the tasks that are learnt. Raises `RecipeError` for one that is not known."""
    known = dataset_class(recipe.dataset.kind).tasks
    for task in recipe.tasks or ([] if known else ["any"]):
        require_known("task of this data set", task, known or ["none: it is for decoders"])
    return {task: known[task] for task in recipe.tasks or known}


class ViewLabels:
    """The labels of `recipe.dataset`, moved to the views as the images are
    (`teachercache.pipeline.loading.loader.LabelSource`).

    Samples are found by their keys. Raises `RecipeError` for a task that the data set does not have, and
    where the cache holds images that have no labels in this split. `tasks`: others than the recipe's.
    """

    def __init__(
        self, recipe: MultiTaskRecipe, cache: FeatureCache, tasks: tuple[str, ...] | None = None
    ) -> None:
        self._dataset = open_dataset(recipe.dataset.kind, recipe.dataset.root, recipe.dataset.split)
        self.tasks = tasks or tuple(task_channels(recipe))
        self._size = cache.spec.views.size
        self._cache, self._checks_files, self._known = cache, not recipe.dataset.reencoded, set[int]()
        self._index = {key: index for index, key in enumerate(self._dataset.keys)}
        keys = cache.samples["key"].to_pylist()
        self._samples = {key: sample for sample, key in enumerate(keys)}
        if strangers := [key for key in keys if key not in self._index]:
            raise RecipeError(
                "The cache holds images that have no labels in this split.",
                got=f"{len(strangers)} of {len(keys)}, such as {strangers[0]}",
                expected=f"the samples of {recipe.dataset.split} alone, such as {self._dataset.keys[0]}",
                do="build the cache from the images of this split (docs/datasets.md)",
            )

    @property
    def layouts(self) -> Mapping[str, TensorLayout]:
        return {task: _layout(task, *self._size) for task in self.tasks}

    def read(self, sample_key: str, view: View) -> Mapping[str, Tensor]:
        index = self._index[sample_key]
        if index not in self._known:
            self._require_cached_image(sample_key, index)
            self._known.add(index)
        return render_labels(self._dataset.labels(index, self.tasks), view, self._size)

    def _require_cached_image(self, sample_key: str, index: int) -> None:
        """Labels of one image and features of another train without a sign. Once a sample and process."""
        sample = self._samples[sample_key]
        width, height, nbytes, head_hash = (
            self._cache.samples[name][sample].as_py() for name in ("width", "height", "nbytes", "head_hash")
        )
        data = self._dataset.image_bytes(index)
        same_file = (len(data), xxhash.xxh3_64_intdigest(data[:HEAD_BYTES])) == (nbytes, head_hash)
        if not same_file and (self._checks_files or decode_image(data).size != (width, height)):
            raise CacheMismatchError(
                f"The labels of {sample_key} are not of the image that was cached.",
                got=f"an image of {len(data):,} bytes in {self._dataset.root}",
                expected=f"the one of {nbytes:,} bytes and {width}×{height} pixels that was cached",
                do="name the data set of the cache (multitask.dataset.root), or build a cache of this one; "
                "where the cache is of re-encoded copies, set multitask.dataset.reencoded=true",
            )


def _layout(task: str, height: int, width: int) -> TensorLayout:
    shapes: dict[str, tuple[int, ...]] = {"normals": (3, height, width), "class": ()}
    floats = dict.fromkeys(("normals", "depth"), torch.float32)
    kinds = floats | {"class": torch.int64, "instances": torch.int32}
    return shapes.get(task, (height, width)), kinds.get(task, torch.uint8)
