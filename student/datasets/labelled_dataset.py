"""A data set with labels: images under their keys in a cache, and an array for each task."""

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from teachercache.pipeline.errors import SourceError, SourceNotFoundError
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.sources.keys import name_problem, printable
from teachercache.pipeline.sources.source import is_image_name

_SHOWN_FILES = 3
_DAMAGE = (  # what the readers of all these formats raise for damaged files
    *(ValueError, LookupError, TypeError, AttributeError, NotImplementedError, SyntaxError),
    *(OSError, EOFError, MatReadError, SafetensorError, TokenError, zlib.error),
)


@dataclass(frozen=True)
class Finding:
    """How many files of one kind a split has. `missing` names the first few missing ones."""

    split: str
    what: str
    found: int
    expected: int
    missing: tuple[str, ...] = ()


class LabelledDataset(ABC):
    """One split of a data set in the folder `root`.

    `tasks`: name → channels of a prediction, as `build_student` takes them. `boundary_distance`: how far a
    predicted boundary may be off, as a fraction of the diagonal. `keys[i]` is the sample key of image i in a
    cache of the split's folder of images.

    `decoder_tasks`: what only decoders learn, "instances" and "class", with the number of classes.

    `FILES`: where the file of a key may be, by its content; the first place that has it counts. `LISTS`: the
    file that lists a split's keys, or the folder that holds their images, and how many the published data set
    has. `FOLDERS`: what a split is called in both, where that is another name.

    Raises `SourceNotFoundError` where the split is missing, `SourceError` for a list with unsafe names.
    """

    name: ClassVar[str]
    tasks: ClassVar[dict[str, int]] = {}
    decoder_tasks: Mapping[str, int] = {}
    boundary_distance: ClassVar[float] = 0.0075
    FILES: ClassVar[dict[str, tuple[str, ...]]]
    LISTS: ClassVar[dict[str, tuple[str, int | None]]]
    FOLDERS: ClassVar[dict[str, str]] = {}

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.root = Path(root).expanduser()
        self.split = split
        self._folder = self.FOLDERS.get(split, split)
        if split not in self.LISTS or not self.list_file.exists():
            raise SourceNotFoundError(
                f"There is no split {split!r} of {self.name} here.",
                got=str(self.root),
                expected=" or ".join(f"{path} for {name}" for name, (path, _) in self.LISTS.items()),
                do=self._advice(),
            )
        self.keys = self._listed_keys()

    @property
    def list_file(self) -> Path:
        return self.root / self.LISTS[self.split][0]

    def image(self, index: int) -> Image.Image:
        """The image, decoded as by a cache's builder: RGB, upright."""
        return decode_image(self.image_bytes(index))

    def image_bytes(self, index: int) -> bytes:
        """The image's file."""
        return self._path("images", self.keys[index]).read_bytes()

    def image_size(self, index: int) -> Size:
        """(height, width) of the image, from its header."""
        with Image.open(self._path("images", self.keys[index])) as image:
            return image.height, image.width

    def labels(
        self, index: int, tasks: Iterable[str] | None = None, measured: bool = False
    ) -> dict[str, NDArray]:
        """The labels of an image for all or some tasks, as in `teachercache.student.datasets.labels.IGNORE`.

        `measured`: those that predictions are measured against, where they differ from those to learn from.
        Raises `SourceNotFoundError` for a missing file, `SourceError` for one that cannot be read or does not
        have the size of its image.
        """
        key, size = self.keys[index], self.image_size(index)
        read = self._measured_label if measured else self._label
        labels = {}
        for task in self.tasks if tasks is None else tasks:
            try:
                labels[task] = read(task, key, size)
            except SourceError:
                raise
            except _DAMAGE as error:
                raise self._unreadable(task, key, f"{type(error).__name__}: {error}") from error
            if labels[task].ndim and labels[task].shape[-2:] != size:
                raise self._unreadable(task, key, f"{labels[task].shape[-2:]} pixels, its image {size}")
        return labels

    def check(self) -> list[Finding]:
        """How complete each kind of file of this split is."""
        expected = self.LISTS[self.split][1] or len(self.keys)
        findings = [Finding(self.split, self.LISTS[self.split][0], len(self.keys), expected)]
        for what in self.FILES:
            missing = [key for key in self.keys if self._find(what, key) is None]
            places, found = " or ".join(self._places(what, "*")), len(self.keys) - len(missing)
            shown = tuple(self._places(what, key)[0] for key in missing[:_SHOWN_FILES])
            findings.append(Finding(self.split, f"{what} ({places})", found, len(self.keys), shown))
        return findings

    def link_images(self, folder: str | os.PathLike[str]) -> Path:
        """Fill `folder`/<split> with links to this split's images, which makes it a source with its keys.

        For data sets that keep the images of all splits in one folder. Returns the folder of the split.
        """
        links = Path(folder) / self.split
        for key in self.keys:
            image = self._path("images", key).resolve()
            link = links / f"{key}{image.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(image)
        return links

    @abstractmethod
    def _label(self, task: str, key: str, size: Size) -> NDArray:
        """The labels of one task. Its errors for damaged files name the file."""

    def _measured_label(self, task: str, key: str, size: Size) -> NDArray:
        return self._label(task, key, size)

    def _listed_keys(self) -> list[str]:
        if self.list_file.is_dir():
            return sorted(path.stem for path in self.list_file.iterdir() if is_image_name(path.name))
        keys = self.list_file.read_text(errors="replace").split()
        for key in keys:
            if problem := name_problem(key):
                raise SourceError(
                    f"{self.list_file} lists an impossible key.",
                    got=f"{printable(key)}: {problem}",
                    expected="names of files without their suffix, one per line",
                    do="unpack the data set again",
                )
        return keys

    def _places(self, what: str, key: str) -> list[str]:
        return [place.format(split=self._folder, key=key) for place in self.FILES[what]]

    def _find(self, what: str, key: str) -> Path | None:
        paths = (self.root / place for place in self._places(what, key))
        return next((path for path in paths if path.is_file()), None)

    def _path(self, what: str, key: str) -> Path:
        path = self._find(what, key)
        if path is None:
            raise SourceNotFoundError(
                f"{self.name} has no {what} for {key}.",
                got=f"nothing in {self.root}",
                expected=" or ".join(self._places(what, key)),
                do=self._advice(),
            )
        return path

    def _advice(self) -> str:
        return f"see what is missing: teachercache datasets {self.name} {self.root}"

    def _unreadable(self, task: str, key: str, got: str) -> SourceError:
        kinds = [task] if task in self.FILES else [what for what in self.FILES if what != "images"]
        return SourceError(
            f"The {task} labels of {key} in {self.name} cannot be used.",
            got=got,
            expected="the files of docs/datasets.md, each the size of its image",
            do=f"unpack the data set again; see {', '.join(str(self._find(what, key)) for what in kinds)}",
        )


def check_folder(dataset: type[LabelledDataset], root: str | os.PathLike[str]) -> list[Finding]:
    """How complete all splits of a data set are in the folder `root`."""
    findings = []
    for split, (path, count) in dataset.LISTS.items():
        if (Path(root).expanduser() / path).exists():
            findings += dataset(root, split).check()
        else:
            findings.append(Finding(split, path, 0, count or 1, (path,)))
    return findings


def read_array(path: Path, variable: str) -> NDArray:
    """The array in an image, a `.npy` or (under `variable`) a MATLAB file; nothing is unpickled."""
    if path.suffix == ".npy":
        array: NDArray = np.load(path, allow_pickle=False)
    elif path.suffix == ".mat":
        array = loadmat(path)[variable]
    else:
        with Image.open(path) as image:
            array = np.array(image)
    return array.squeeze()


def unit_normals(normals_HW3: NDArray) -> NDArray[np.float32]:
    """(3, H, W) of length 1, from vectors or from an image that holds (n + 1) · 255 / 2.

    Vectors shorter than 0.5 have no direction and become 0.
    """
    if normals_HW3.dtype == np.uint8:
        normals_HW3 = 2.0 * normals_HW3 / 255.0 - 1.0
    length_HW = np.sqrt((normals_HW3.astype(np.float64) ** 2).sum(-1))
    known_HW = length_HW >= 0.5
    scale_HW = np.divide(1.0, length_HW, out=np.zeros_like(length_HW), where=known_HW)
    return np.ascontiguousarray((normals_HW3 * scale_HW[..., None]).transpose(2, 0, 1), np.float32)
