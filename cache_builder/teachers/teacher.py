"""What every teacher returns, what every kind of teacher can tell about a model, and how pixels enter."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self

import torch
import xxhash
from torch import Tensor, nn

from teachercache.cache_builder.teachers.sam_attention import FoldedAttention
from teachercache.pipeline.errors import TeacherInputError
from teachercache.pipeline.grids import made_once
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.views import enlarge_and_pad

RGB = tuple[float, float, float]
_PACKAGES = ("teachercache", "torch", "torchvision", "timm", "transformers", "pillow", "numpy", "zarr")


@dataclass(frozen=True)
class Architecture:
    """A model before an input size is chosen.

    `model` is the complete name (with timm's tag), `patch` (h, w) what image sizes are multiples of.
    `has_positions`: learnt ones, a map of them, which is resampled for another image size.
    `has_layer_scale`: timm's `init_values` says where it starts.
    """

    model: str
    patch: Size
    mean: RGB
    std: RGB
    has_positions: bool = False
    has_layer_scale: bool = False


@dataclass(frozen=True)
class Outputs:
    """A model's outputs at one input size: (width, grid) of every block, and its other features.

    `global_width` is None when it has no global feature, or none was requested.
    """

    blocks: tuple[tuple[int, Size], ...]
    has_cls_token: bool
    global_width: int | None


@dataclass
class TeacherFeatures:
    """One forward pass over B views (S levels, H×W native grid, C channels).

    `feature_maps_BSHWC` are raw block outputs: no final norm, prefix tokens dropped.
    `cls_token_BSC` is None for teachers without one (SAM, SigLIP), never zeros.
    `global_feature_BD` is the projected or pooled image feature, if the spec requests it.
    """

    feature_maps_BSHWC: Tensor
    cls_token_BSC: Tensor | None
    global_feature_BD: Tensor | None

    def first(self, count: int) -> TeacherFeatures:
        """Those of the first `count` views."""
        others = (self.cls_token_BSC, self.global_feature_BD)
        return TeacherFeatures(
            self.feature_maps_BSHWC[:count], *(one if one is None else one[:count] for one in others)
        )


class Teacher(nn.Module, ABC):
    """A frozen encoder in eval mode. Each subclass is one kind of model; `registry.py` lists them.

    `Kind(spec)` builds the model with its weights on the current default device. The class methods
    answer without weights, so that a recipe can be resolved and planned anywhere.
    """

    shares_passes: ClassVar[bool] = False  # with teachers that differ from it in their blocks alone
    spec: TeacherSpec
    weights_hash: str

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.spec = spec
        self.compiled_for = 0

    @classmethod
    @abstractmethod
    def models(cls) -> Collection[str]:
        """Every model name that this kind can build."""

    @classmethod
    @abstractmethod
    def describe(cls, model: str) -> Architecture: ...

    @classmethod
    @abstractmethod
    def probe(cls, model: str, image_size: Size, global_feature: bool) -> Outputs:
        """Raises `TeacherInputError` when the model cannot take this size."""

    def sharing(self, spec: TeacherSpec) -> Self:
        """Another teacher of this one's pass (`registry.passes`), on the same weights."""
        raise NotImplementedError

    @abstractmethod
    def repeated_parts(self) -> Iterable[nn.Module]:
        """What the network repeats, to be compiled one by one: equal parts are compiled once."""

    def compile_blocks(self, batch_size: int) -> None:
        """Run torch.compile over `repeated_parts`, before the first forward pass.

        Fewer views than `batch_size` are filled up to it: another number would be compiled anew.
        """
        for part in self.repeated_parts():
            part.compile(dynamic=False)
        self.compiled_for = batch_size

    def keep_rounded(self) -> None:
        """Keep weights in bfloat16 where autocast would round them at every pass, with the same result."""
        if self.spec.precision == "bfloat16":
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d | FoldedAttention):
                    module.to(torch.bfloat16)

    def forward(self, pixels_B3HW: Tensor) -> TeacherFeatures:
        """`pixels_B3HW` is uint8 at `spec.render_size`; normalisation happens here, on the device."""
        return self.together(pixels_B3HW, [self.spec])[0]

    def together(self, pixels_B3HW: Tensor, specs: Sequence[TeacherSpec]) -> list[TeacherFeatures]:
        """What the teachers of `specs` give, in one forward pass of this one (`registry.passes`)."""
        missing = max(0, self.compiled_for - len(pixels_B3HW))  # filled up with the last view
        filled_B3HW = torch.cat([pixels_B3HW, *[pixels_B3HW[-1:]] * missing]) if missing else pixels_B3HW
        return [features.first(len(pixels_B3HW)) for features in self.features(filled_B3HW, specs)]

    @abstractmethod
    def features(self, pixels_B3HW: Tensor, specs: Sequence[TeacherSpec]) -> list[TeacherFeatures]:
        """Those of the teachers of `specs`, copied outside inference mode: a loss may save them for its
        backward pass."""


def preprocess(pixels_B3HW: Tensor, spec: TeacherSpec) -> Tensor:
    """uint8 views at `render_size` → normalised float32 at `image_size`.

    The two sizes differ only under `sak_compat`, see `enlarge_and_pad`.
    """
    if pixels_B3HW.dtype != torch.uint8 or pixels_B3HW.shape[1:] != (3, *spec.render_size):
        raise TeacherInputError(
            f"These views do not fit {spec.model}.",
            got=f"{pixels_B3HW.dtype} of shape {tuple(pixels_B3HW.shape)}",
            expected=f"torch.uint8 of shape (B, 3, {spec.render_size[0]}, {spec.render_size[1]})",
            do="render the views at spec.render_size",
        )
    mean, std = _statistics(spec.mean, spec.std, pixels_B3HW.device)
    x: Tensor = (pixels_B3HW.float() / 255 - mean) / std
    if spec.render_size == spec.image_size:
        return x
    return enlarge_and_pad(x, spec.image_size)


@made_once
def _statistics(mean: RGB, std: RGB, device: torch.device) -> Tensor:
    return torch.tensor([mean, std], device=device).view(2, 1, 3, 1, 1)


def autocast(spec: TeacherSpec, device: torch.device) -> Any:
    """The context in which a forward pass has the precision of `spec`."""
    return torch.autocast(device.type, torch.bfloat16) if spec.precision == "bfloat16" else nullcontext()


def weights_hash(module: nn.Module) -> str:
    """xxh3-128 over names, dtypes, shapes and bytes of the state dict, sorted by name, in hex.

    Independent of device and memory format. 0.2 s for a ViT-L (1.2 GB).
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """{package: version}; a package that is not installed is left out."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
