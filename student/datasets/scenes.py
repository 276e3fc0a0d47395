"""The synthetic scenes as a data set in a folder, for stage 2 where the real data sets are not at hand.

python -m teachercache.student.datasets.scenes OUT --train 200 --val 50 --size 128 128
teachercache build RECIPE source.path=OUT/images/train …
open_dataset("scenes", "OUT", "train")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.labelled_dataset import LabelledDataset
from teachercache.student.datasets.synthetic.person import PARTS
from teachercache.student.datasets.synthetic.scene_renderer import CLASSES, THINGS, render_scene


class Scenes(LabelledDataset):
    """The data set that `write_scenes` writes; its labels are those of `scene_renderer.Scene`. An image's
    class is that of the things that fill most of it."""

    name = "scenes"
    tasks: ClassVar = {
        "semseg": len(CLASSES),
        "parts": len(PARTS),
        "saliency": 2,
        "depth": 1,
        "normals": 3,
        "boundary": 1,
    }
    decoder_tasks: Mapping[str, int] = {"instances": len(THINGS), "class": len(THINGS) + 1}  # or none
    FILES: ClassVar = {
        "images": ("images/{split}/{key}.png",),
        "labels": ("labels/{split}/{key}.safetensors",),
    }
    LISTS: ClassVar = {"train": ("train.txt", None), "val": ("val.txt", None)}

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        if task == "class":
            areas = np.bincount(self._label("instances", key, size).ravel() % 256, minlength=len(THINGS) + 1)
            return np.array(areas[1:].argmax() if areas[1:].any() else len(THINGS))
        with safe_open(self._path("labels", key), "numpy") as file:
            array: NDArray = file.get_tensor(task)
        return array


def write_scenes(root: str | Path, train: int, val: int, size: Size = (128, 128), seed: int = 0) -> None:
    """Render scenes 0 … train - 1 for training and the next `val` for evaluation into the folder `root`.

    images/<split>/<key>.png, labels/<split>/<key>.safetensors, and <split>.txt with the keys, written last.
    The same arguments write the same pixels. Earlier scenes in this folder are deleted; other files stay.
    Raises `RecipeError` if images of another data set have the names of scenes.
    """
    root = Path(root)
    _require_own(root)
    for split, numbers in (("train", range(train)), ("val", range(train, train + val))):
        images, labels = root / "images" / split, root / "labels" / split
        (root / f"{split}.txt").unlink(missing_ok=True)
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for label in labels.glob(f"{'[0-9]' * 6}.safetensors"):
            (images / f"{label.stem}.png").unlink(missing_ok=True)
            label.unlink()
        for number in numbers:
            scene = render_scene(seed, number, size)
            save_file(scene.labels, labels / f"{number:06d}.safetensors")
            Image.fromarray(scene.image_HW3).save(images / f"{number:06d}.png")
        (root / f"{split}.txt").write_text("".join(f"{number:06d}\n" for number in numbers))


def _require_own(root: Path) -> None:
    """A scene's labels are written before its image, so an image without labels is not a scene."""
    for image in root.glob(f"images/*/{'[0-9]' * 6}.png"):
        labels = root / "labels" / image.parent.name / f"{image.stem}.safetensors"
        if image.parent.name in Scenes.LISTS and not labels.exists():
            raise RecipeError(
                "Scenes would overwrite images of another data set.",
                got=f"{image}, without {labels}",
                expected="an empty folder, or one with scenes",
                do="name another folder",
            )


def main(root: Path, train: int = 200, val: int = 50, size: Size = (128, 128), seed: int = 0) -> None:
    """Render a synthetic multi-task data set of images of SIZE, height and width, into the folder ROOT."""
    write_scenes(root, train, val, size, seed)
    print(f"{root}: {train} scenes to train on, {val} to evaluate")


if __name__ == "__main__":
    typer.run(main)
