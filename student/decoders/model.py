"""Decoders together with what they work on: a student, frozen or learnt, or teachers' features from a
cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.student.build import load_student
from teachercache.student.decoders import decoder_class
from teachercache.student.decoders.decoder import STRIDES, Decoder, Widths
from teachercache.student.models.student import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ImageRepresentation,
    Student,
    find_saved,
    read_config,
    write_saved,
)

Inputs = Tensor | Mapping[str, tuple[Tensor, Tensor | None]]
"""uint8 images (B, 3, H, W), or by teacher its maps (B, S, H, W, C) and its class token (B, C)."""


class Decoders(nn.Module):
    """`made_of`: by name what each decoder is: `kind`, `classes`, `widths` of its features, `options`, and
    the `teachers` whose features it reads where there is no `student`. With `learns` the student learns, too.

    Raises `RecipeError` for options that a decoder does not have.
    """

    decoders: Any  # a ModuleDict of `Decoder`, which its type cannot express

    def __init__(
        self, made_of: Mapping[str, Any], image_size: Size, student: Student | None, learns: bool = False
    ) -> None:
        super().__init__()
        self.made_of, self.image_size, self.learns = dict(made_of), image_size, learns
        self.student = student
        self.decoders = nn.ModuleDict({name: _build(**content) for name, content in made_of.items()})
        if student is not None:
            self._let_learn(student)

    def represent(self, inputs: Inputs) -> ImageRepresentation:
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return represent(self.student, inputs)

    def forward(self, batches: Mapping[str, tuple[Inputs, Tensor]]) -> dict[str, Tensor]:
        """By `decoder/term` the losses of a batch for each decoder: its inputs and its labels."""
        losses = {}
        for name, (inputs, labels) in batches.items():
            for term, loss in self.decoders[name].losses(self.represent(inputs), labels).items():
                losses[f"{name}/{term}"] = loss
        return losses

    @torch.no_grad()
    def predict(self, name: str, inputs: Inputs, size: Size | None = None) -> Any:
        """What a decoder says of images of `size`; see `Decoder.predict`."""
        return self.decoders[name].predict(self.represent(inputs), size or self.image_size)

    def train(self, mode: bool = True) -> Decoders:
        super().train(mode)
        if self.student is not None and not self.learns:
            self.student.eval()
        return self

    def save_pretrained(self, folder: str | os.PathLike[str], student: str | None) -> None:
        """Write two files, each whole or not at all; `student` is where the student is found, from there."""
        config = {"student": student, "image_size": list(self.image_size), "decoders": self.made_of}
        write_saved(Path(folder), self.decoders.state_dict(), config)

    def _let_learn(self, student: Student) -> None:
        """Those parameters alone that the decoders' features depend on: DDP waits for the gradients of
        all."""
        student.requires_grad_(self.learns)
        if not self.learns:
            return
        parameters = list(student.parameters())
        found = self.represent(torch.zeros(1, 3, *self.image_size, dtype=torch.uint8))
        reads_image = any(one.reads_image for one in self.decoders.values())
        read = [*found.maps, found.image] if reads_image else found.maps
        gradients = torch.autograd.grad([one.sum() for one in read], parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def load_decoders(folder: str | os.PathLike[str]) -> Decoders:
    """What `train_decoders` wrote to `<output>/decoders`, in eval mode on the CPU, with its student."""
    config = read_config(Path(folder))
    height, width = config["image_size"]
    student = config["student"] and load_student_at(Path(folder) / config["student"], (height, width))
    decoders = Decoders(config["decoders"], (height, width), student)
    decoders.decoders.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
    return decoders.eval()


def require_paper(folder: str | os.PathLike[str], paper: str | None) -> bool:
    """Whether `folder` holds decoders. Raises `RecipeError` where `paper` has no such rows, and
    `CheckpointError` where there is nothing to have any."""
    file = Path(folder) / CONFIG_FILE
    are_decoders = file.is_file() and "decoders" in read_config(Path(folder))
    if paper not in (None, "kpu" if are_decoders else "sak"):
        find_saved(folder)
        raise RecipeError(
            f"{paper.upper()}'s tables have no rows for this.",
            got=f"{folder}, which holds {'decoders' if are_decoders else 'a student'}",
            expected="a student of stage 2 for sak, decoders on a student's features for kpu",
            do="leave out --paper"
            if are_decoders
            else f"teachercache train-decoders kpu_decoders_frozen student={folder} output=OUTPUT, and then"
            " teachercache evaluate OUTPUT/decoders DATASET ROOT --paper kpu",
        )
    return are_decoders


def load_student_at(folder: str | os.PathLike[str], image_size: Size) -> Student:
    """A student that takes images of this size. Raises `RecipeError` for a size that the strides do not
    divide."""
    require_divided(image_size)
    student: Any = load_student(folder)
    with torch.no_grad():
        if student.reads_features:
            student.features(torch.empty(0))  # says what to do instead
        student.stem.resize(image_size)
    if not student.config.get("image_sizes"):  # whose stem keeps the positions of its own size
        student.config["image_size"] = list(image_size)
    return student


def require_divided(image_size: Size) -> None:
    """Raises `RecipeError`."""
    if any(side % STRIDES[-1] for side in image_size):
        raise RecipeError(
            "Images of this size cannot be decoded.",
            got=f"image_size {image_size[0]}×{image_size[1]}",
            expected=f"multiples of {STRIDES[-1]} pixels, the coarsest stride",
            do="choose such a size, for example 512×512",
        )


def represent(student: Student | None, inputs: Inputs) -> ImageRepresentation:
    """What decoders work on: a student's features, or teachers side by side, at each level on the grid of the
    first; the class token, or the mean of the last map, of each. Four of one level on four grids, as the maps
    of GroundingDINO are, make a pyramid."""
    if isinstance(inputs, Tensor):
        assert student is not None
        return student.features(student.normalize(inputs))
    of_each, images = list[list[Tensor]](), list[Tensor]()
    for maps_BSHWC, cls_token_BC in inputs.values():
        of_each.append(list(maps_BSHWC.permute(0, 1, 4, 2, 3).float().unbind(1)))
        images.append(of_each[-1][-1].mean((2, 3)) if cls_token_BC is None else cls_token_BC.float())
    maps = []
    for at in zip(*of_each, strict=True):
        grid = at[0].shape[2], at[0].shape[3]
        maps.append(torch.cat([upsample(level, grid) for level in at], 1))
    grids = {one.shape[2:] for levels in of_each for one in levels}
    if len(maps) == 1 and len(of_each) == len(grids) == len(STRIDES):
        maps = sorted((levels[0] for levels in of_each), key=lambda map_BCHW: -map_BCHW[0, 0].numel())
    return ImageRepresentation(torch.cat(images, 1), maps)


def _build(kind: str, classes: int, widths: Any, options: Mapping[str, Any], **_: Any) -> Decoder:
    made: Any = decoder_class(kind)
    image, maps = widths
    own = [name for name in made.__init__.__annotations__ if name not in ("widths", "classes", "return")]
    for option in options:
        require_known(f"option of the decoder {kind}", option, own or ["none"])
    return made(Widths(image, tuple(maps)), classes, **options)
