"""The Teacher-Agnostic Stem: a timm ViT, read after its patch embedding and after every block.

B  images          N  tokens, those before the patches (cls, registers) included
L  blocks          D  width of the stem
Z_l (B, N, D)      the output of block l; Z_0 is what enters block 1
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError, WeightsNotFoundError
from pipeline.spec import Size
from student.base import NUM_LEVELS


class Stem(nn.Module):
    """Any plain ViT of timm, without final norm and classifier; all its tokens are kept.

    Raises `RecipeError` for a name or an image size that cannot work, `WeightsNotFoundError` when
    `pretrained` weights cannot be had.
    """

    vit: Any  # timm does not type its models

    def __init__(self, name: str, image_size: Size, pretrained: bool = False) -> None:
        super().__init__()
        self.vit = _create(name, image_size, pretrained)
        self.width: int = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.grid: Size = tuple(self.vit.patch_embed.grid_size)
        self.mean: tuple[float, ...] = self.vit.pretrained_cfg["mean"]
        self.std: tuple[float, ...] = self.vit.pretrained_cfg["std"]
        self.level_blocks = level_blocks(self.depth)

    def forward(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """[Z_0, …, Z_L] (SAK, Eq. 1).

        The ViT runs through its own forward and hooks note what passes, because positions (added, rotary)
        and extra tokens are handled differently by each family of timm.
        """
        tokens_BND: list[Tensor] = []
        blocks = self.vit.blocks
        handles = [blocks[0].register_forward_pre_hook(lambda _, inputs: tokens_BND.append(inputs[0]))]
        handles += [
            block.register_forward_hook(lambda _, __, output: tokens_BND.append(output)) for block in blocks
        ]
        try:
            self.vit.forward_features(pixels_B3HW)
        finally:
            for handle in handles:
                handle.remove()
        return tokens_BND

    def resize(self, image_size: Size) -> None:
        """Take images of another size from now on; timm resamples the position embeddings."""
        self.vit.set_input_size(img_size=tuple(image_size))
        self.grid = tuple(self.vit.patch_embed.grid_size)


def level_blocks(depth: int) -> list[int]:
    """The blocks L/4, L/2, 3L/4 and L, counted from 1; rounded up where 4 does not divide L."""
    return [math.ceil(depth * level / NUM_LEVELS) for level in range(1, NUM_LEVELS + 1)]


def _create(name: str, image_size: Size, pretrained: bool) -> Any:
    if not timm.is_model(name):
        plain = timm.list_models([f"{family}*" for family in ("vit", "deit", "beit", "eva")])
        near = difflib.get_close_matches(name, plain, 3)
        raise RecipeError(
            "timm has no model of this name, so it cannot be a stem.",
            got=name,
            expected="a ViT of timm, such as vit_base_patch16_384",
            do=f"did you mean {' or '.join(near)}?" if near else "see timm.list_models('*vit*')",
        )
    _require_fit(name, image_size)
    try:
        vit = timm.create_model(name, pretrained=pretrained, img_size=tuple(image_size))
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise WeightsNotFoundError(
            f"The pretrained weights of the stem {name} could not be had.",
            got=error,
            expected="a connection to the Hugging Face Hub, or its cache with these weights in it",
            do="download them where there is a network and set HF_HOME, or set student.pretrained=false",
        ) from error
    vit.prune_intermediate_layers(len(vit.blocks), prune_norm=True, prune_head=True)
    return vit


def _require_fit(name: str, image_size: Size) -> None:
    with torch.device("meta"):  # the architecture alone, in milliseconds
        blank = timm.create_model(name)
    is_plain = isinstance(getattr(blank, "num_prefix_tokens", None), int) and hasattr(blank, "patch_embed")
    if not is_plain or len(getattr(blank, "blocks", ())) < NUM_LEVELS:
        raise RecipeError(
            f"{name} cannot be a stem.",
            got=f"a {type(blank).__name__}",
            expected=f"a plain ViT: patch tokens of one width through at least {NUM_LEVELS} blocks",
            do="choose a vit_*, deit*, beit* or eva* model of timm",
        )
    patch = blank.patch_embed.feat_ratio(as_scalar=False)
    if any(pixels % step for pixels, step in zip(image_size, patch, strict=True)):
        fitting = tuple(max(1, round(n / step)) * step for n, step in zip(image_size, patch, strict=True))
        raise RecipeError(
            f"The stem {name} cuts images into patches of {patch[0]}×{patch[1]} pixels.",
            got=f"an image size of {tuple(image_size)}",
            expected="multiples of the patch",
            do=f"{fitting} is the nearest size; the views of the cache must have it",
        )
