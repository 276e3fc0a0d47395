"""The base of every student: a model that normalises its own input, and can be saved and loaded.

A saved student is a folder of two files, `config.json` (kind and arguments) and `model.safetensors`.
Loading it needs neither a cache nor a teacher.
"""

import difflib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teachercache.pipeline.errors import ArgumentError, CheckpointError, RecipeError, TeacherCacheError
from teachercache.pipeline.places.durable import make_folder
from teachercache.pipeline.places.hub_storage import CARD_FILE
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.student.models.lora import merged_state_dict
from teachercache.student.saving import replacing

NUM_LEVELS = 4  # the ends of the four quarters of a network, for students and teachers alike
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_OF_A_CONFIG = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)  # that was edited


class TeacherFacts(NamedTuple):
    """What a student is built from of a teacher: its channels, the (rows, columns) of its maps, whether it
    has a class token, how many levels, and (height, width) of the student's images where that is known."""

    width: int
    grid: Size
    cls_token: bool = False
    num_levels: int = NUM_LEVELS
    image_size: Size | None = None

    @classmethod
    def of(cls, spec: TeacherSpec, views: ViewPolicy) -> Self:
        """Of students that see windows of these views."""
        grid = views.seen_grid(spec.stored_grid)
        return cls(spec.width, grid, spec.cls_token, spec.num_levels, views.size)


class StudentOutput(NamedTuple):
    """All outputs of a student for a batch.

    `feature_maps`: for each teacher its levels, each (B, C of the teacher, h, w). `predictions`: for each
    task (B, channels, H, W) at the size of the image, as the task's loss takes them: logits, depths,
    normals of any length. `gates`: for each task (B, levels, experts), if the student has routers.
    """

    feature_maps: dict[str, list[Tensor]]
    predictions: dict[str, Tensor]
    gates: dict[str, Tensor]


class ImageRepresentation(NamedTuple):
    """X of KPU: `image` x (B, D), and V at every scale, `maps` (B, C, h, w) from fine to coarse."""

    image: Tensor
    maps: list[Tensor]


class Student(nn.Module, ABC):
    """`config` holds the constructor's arguments in JSON's types (`config_of`); `teacher_dims`, `image_size`
    and `tasks` are among them.

    Mean and standard deviation (of pixels in 0–1) are stored with the weights, so that a student always
    sees pixels as in training.
    """

    kind: ClassVar[str]
    PARTS: ClassVar[Mapping[str, str]]  # by name, the pattern of their parameters' names
    num_levels: ClassVar[int] = NUM_LEVELS  # maps per teacher
    for_distillation: ClassVar[frozenset[str]] = frozenset()  # parts that predictions do not need
    reads_features: ClassVar[bool] = False  # whether `forward` also takes the teachers' features
    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.config = dict(config)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @property
    def teachers(self) -> list[str]:
        return list(self.config["teacher_dims"])

    @property
    def tasks(self) -> dict[str, int]:
        """Name → output channels; empty for a student without predictions (stage 1)."""
        return dict(self.config["tasks"])

    @property
    def image_size(self) -> Size:
        height, width = self.config["image_size"]
        return height, width

    def normalize(self, images_B3HW: Tensor) -> Tensor:
        """uint8 RGB images → the float32 pixels that `forward` takes, on the device of the images.

        Raises `ValueError` for anything else, such as images of 0–1 or with alpha.
        """
        if images_B3HW.dtype != torch.uint8 or images_B3HW.ndim < 3 or images_B3HW.shape[-3] != 3:
            raise ArgumentError(
                "Images must be RGB, uint8.",
                got=f"{images_B3HW.dtype} of shape {tuple(images_B3HW.shape)}",
                expected="torch.uint8 of shape (B, 3, H, W), values 0 to 255",
                do="pass images as decoded, channels first",
            )
        return (images_B3HW.float() / 255 - self.mean) / self.std

    @abstractmethod
    def forward(
        self, pixels_B3HW: Tensor, full: bool = False, maps: bool = True
    ) -> dict[str, list[Tensor]] | dict[str, Tensor] | StudentOutput:
        """Normalised pixels → the predictions or, for a student without tasks, the feature maps; with `full`,
        a `StudentOutput` with everything, but without feature maps unless `maps`."""

    @property
    def experts(self) -> list[str]:
        """What the gates weigh, in order, of a student with gates."""
        return []

    def features(self, pixels_B3HW: Tensor) -> ImageRepresentation:
        """What decoders work on, of normalised pixels. Raises `ArgumentError` for a student without any."""
        raise ArgumentError(
            "This student has no features of its own.",
            got=f"a student of kind {self.kind}",
            expected="one that sees images alone, such as sak or kpu",
            do="name the cache of its teachers instead",
        )

    def freeze(self, *parts: str) -> None:
        """Exclude parts from training, each named as a submodule: "stem", "paths", "paths.clip", …

        Raises `RecipeError` for a part that does not exist.
        """
        modules = dict(self.named_modules())
        for part in parts:
            if part not in modules:
                near = difflib.get_close_matches(part, modules, 1)
                raise RecipeError(
                    "The student has no such part to freeze.",
                    got=part,
                    expected="a submodule: " + ", ".join(name for name, _ in self.named_children()),
                    do=f"did you mean {near[0]}?" if near else None,
                )
            modules[part].requires_grad_(False)

    def keep_levels(self, teacher: str, count: int) -> None:
        """Exclude from training what only distillation needs for levels before the last `count`, if any."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode and without gradients; afterwards each part is in the mode it was in."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def parameters_by_part(self) -> dict[str, int]:
        """The number of parameters of each of `PARTS`; one pattern matches each, so they are the whole."""
        counts = dict.fromkeys(self.PARTS, 0)
        for name, parameter in self.named_parameters():
            (part,) = (part for part, pattern in self.PARTS.items() if re.match(pattern, name))
            counts[part] += parameter.numel()
        return counts

    @property
    def num_parameters(self) -> int:
        """The number used to predict, as SAK counts it (B.1: without aligners)."""
        parts = self.parameters_by_part()
        return sum(count for part, count in parts.items() if part not in self.for_distillation)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files, each whole or not at all; they survive a power cut after this returns."""
        write_saved(Path(folder), merged_state_dict(self), {"kind": self.kind, **self.config})

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
    ) -> Self:
        """The student in a folder, or in a repository of the Hub, in eval mode on the CPU; without `weights`
        only what its config says.

        Raises `CheckpointError` for a student of another kind, and for files that are missing, damaged or
        do not fit the config.
        """
        folder = find_saved(source, revision)
        config = read_config(folder)
        if (kind := config.pop("kind", None)) != cls.kind:
            raise CheckpointError(
                f"The student in {folder} is of another kind.",
                got=kind,
                expected=cls.kind,
                do="use teachercache.load_student(), which loads every kind",
            )
        try:
            student = cls(**config)
            if weights:
                student.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except TeacherCacheError:
            raise
        except (OSError, SafetensorError, RuntimeError, *_OF_A_CONFIG) as error:
            raise CheckpointError(
                f"The student in {folder} cannot be loaded.",
                got=error,
                expected=f"a {CONFIG_FILE} and a {WEIGHTS_FILE} that save_pretrained() wrote together",
                do="copy or download the folder again",
            ) from error
        return student.eval()


def config_of(constructor: Mapping[str, Any]) -> dict[str, Any]:
    """What a student can be built from again, in JSON's types, of its constructor's `locals()`: all but
    `pretrained`, since its weights are saved."""
    others = {"self", "__class__", "pretrained"}
    kept = {name: value for name, value in constructor.items() if name not in others}
    return json.loads(json.dumps(kept, default=dict))


def initialise_linear(module: nn.Module) -> None:
    """As of a new ViT, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def check_names(what: str, names: Iterable[str]) -> None:
    """Raise `RecipeError` for a name that no part of a student can have."""
    for name in names:
        if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict(), name):
            raise RecipeError(
                f"This {what}'s name cannot be the name of a part of the student.",
                got=repr(name),
                expected="letters, digits, - and _, but not a name that PyTorch uses, such as train or half",
                do=f"choose another name for this {what}",
            )


def require_teachers(teacher_dims: Mapping[str, int]) -> None:
    if not teacher_dims:
        raise RecipeError("A student needs a teacher.", got="none", expected="one or more", do="name them")


def write_saved(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """What `find_saved` and `read_config` read."""
    make_folder(folder)
    with replacing(folder / WEIGHTS_FILE) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with replacing(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(config, indent=2) + "\n")


def find_saved(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a saved student; one on the Hub is downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    try:
        return Path(snapshot_download(os.fspath(source), revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "There is no such student.",
            got=os.fspath(source),
            expected="a folder that save_pretrained() wrote, or a repository of the Hugging Face Hub",
            do="check the path; a finished run leaves its student in <output>/student",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read.",
            got=error,
            expected="the JSON that save_pretrained() writes",
            do="copy or download the folder again",
        ) from error
    return config
