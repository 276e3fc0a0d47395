"""The Teacher-Agnostic Stem: a timm ViT, read after its patch embedding and after every block.

B  images          N  tokens, those before the patches (cls, registers) included
h, w               grid of the patches
L  blocks          D  width of the stem
Z_l (B, N, D)      the tokens after l blocks; Z_0 enters the first
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import ArgumentError, RecipeError, WeightsNotFoundError
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.views import enlarge_and_pad
from teachercache.student.models.student import NUM_LEVELS

SAM_SIDE = 1024  # pixels; SAM was trained on squares of this size
Between = Callable[[int, Tensor], Tensor]  # (l, Z_l) → Z_l


class Stem(nn.Module):
    """Any plain ViT of timm, or SAM's, without final norm, neck and classifier; all its tokens are kept.

    Images whose sides are not multiples of the patch are resampled to the nearest ones: 512² → 518² for a
    patch of 14 pixels, as for a teacher. `sak_compat` prepares images as it does for teachers: ImageNet's
    statistics for every model, pixels that fill no patch dropped (512² → 36×36 tokens), SAM at 1024².
    `resizes`: positions are resampled at each pass, as they are for one size, so that sizes can take turns.
    Raises `RecipeError` for a name that cannot be a stem, `WeightsNotFoundError` if `pretrained` weights
    cannot be loaded.
    """

    vit: Any  # timm does not type its models

    def __init__(
        self,
        name: str,
        image_size: Size,
        pretrained: bool = False,
        sak_compat: bool = False,
        resizes: bool = False,
    ) -> None:
        super().__init__()
        self._sak_compat, self._resizes = sak_compat, resizes
        self.patch, self._resamples_itself = _require_vit(name)
        self._fit(image_size)
        sizes: dict[str, Any] = {} if self._resamples_itself else {"img_size": self._input_size}
        sizes |= {"dynamic_img_size": True} if resizes and sizes else {}
        self.vit = _create(name, sizes, pretrained)
        self.width: int = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.num_prefix_tokens: int = getattr(self.vit, "num_prefix_tokens", 0)
        self.has_class_token = getattr(self.vit, "cls_token", None) is not None
        own = self.vit.pretrained_cfg
        self.mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN if sak_compat else own["mean"]
        self.std: tuple[float, ...] = IMAGENET_DEFAULT_STD if sak_compat else own["std"]
        self.level_depths = level_depths(self.depth)
        self._between: Between | None = None
        self._tokens_BND: list[Tensor] = []
        self.vit.blocks[0].register_forward_pre_hook(self._enter)
        for block in self.vit.blocks:
            block.register_forward_hook(self._leave)

    def forward(self, pixels_B3HW: Tensor, between: Between | None = None) -> list[Tensor]:
        """[Z_0, …, Z_L] (SAK, Eq. 1). `between` may replace each, also for the blocks after it.

        The ViT runs through its own forward and hooks note what passes, because positions (added, rotary)
        and extra tokens are handled differently by each family of timm. They stay: a compiler takes new ones
        for another model.
        """
        self._require_size(pixels_B3HW)
        if self._sak_compat and self._resamples_itself:
            pixels_B3HW = enlarge_and_pad(pixels_B3HW, self._input_size)
        elif self._input_size != self._image_size:
            pixels_B3HW = F.interpolate(pixels_B3HW, self._input_size, mode="bilinear", antialias=True)
        self._between, self._tokens_BND = between, []
        self.vit.forward_features(pixels_B3HW)
        tokens_BND, self._between, self._tokens_BND = self._tokens_BND, None, []
        return tokens_BND

    def levels(self, tokens_BND: Sequence[Tensor]) -> list[Tensor]:
        """The patch tokens (B, n, D) of each level, of [Z_0, …, Z_L]."""
        return [tokens_BND[block][:, self.num_prefix_tokens :] for block in self.level_depths]

    def summary(self, tokens_BND: Tensor) -> Tensor:
        """(B, D): the class token or, without any, the mean of the patch tokens."""
        return tokens_BND[:, 0] if self.has_class_token else tokens_BND[:, self.num_prefix_tokens :].mean(1)

    def _enter(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._visit(inputs[0]), *inputs[1:]

    def _leave(self, _: nn.Module, __: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return self._visit(tokens)

    def _visit(self, tokens: Tensor) -> Tensor:
        block_BND = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # SAM's are (B, h, w, D)
        if self._between:
            block_BND = self._between(len(self._tokens_BND), block_BND)
        self._tokens_BND.append(block_BND)
        return block_BND.view_as(tokens)

    def resize(self, image_size: Size) -> None:
        """Take images of another size from now on; timm resamples the position embeddings."""
        self._fit(image_size)
        if not (self._resamples_itself or self._resizes):
            self.vit.set_input_size(img_size=self._input_size)

    def _fit(self, image_size: Size) -> None:
        self._image_size: Size = image_size[0], image_size[1]
        self._input_size: Size = self._input_size_of(image_size)
        self.grid: Size = self.grid_of(image_size)

    def grid_of(self, image_size: Size) -> Size:
        """(rows, columns) of the patches of such images."""
        height, width = self._input_size_of(image_size)
        return height // self.patch[0], width // self.patch[1]

    def _input_size_of(self, image_size: Size) -> Size:
        if self._sak_compat:
            return (SAM_SIDE, SAM_SIDE) if self._resamples_itself else image_size
        rows, columns = (max(1, round(n / patch)) for n, patch in zip(image_size, self.patch, strict=True))
        return rows * self.patch[0], columns * self.patch[1]

    def _require_size(self, pixels_B3HW: Tensor) -> None:
        if pixels_B3HW.shape[1:] != (3, *self._image_size):
            raise ArgumentError(
                "The student takes images of one size.",
                got=f"pixels of shape {tuple(pixels_B3HW.shape)}",
                expected=f"(B, 3, {self._image_size[0]}, {self._image_size[1]})",
                do="resample the images, or student.stem.resize() for a student without tasks",
            )


def level_depths(depth: int) -> list[int]:
    """After how many blocks each level is read: L/4, L/2, 3L/4 and L, rounded up if 4 does not divide L."""
    return [math.ceil(depth * level / NUM_LEVELS) for level in range(1, NUM_LEVELS + 1)]


def _create(name: str, sizes: Mapping[str, Any], pretrained: bool) -> Any:
    try:
        vit = timm.create_model(name, pretrained=pretrained, **sizes)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        raise RecipeError(
            f"The stem {name} cannot take images of several sizes in turns.",
            got="inputs of several sizes, and positions that timm resamples once",
            expected="a stem whose positions follow the image, such as a vit_* or an eva02_*",
            do="choose another student.stem, or caches whose views have one size",
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise WeightsNotFoundError(
            f"The pretrained weights of the stem {name} could not be loaded.",
            got=error,
            expected="a connection to the Hugging Face Hub, or its cache with these weights in it",
            do="download them where there is a network and set HF_HOME, or set student.pretrained=false",
        ) from error
    vit.prune_intermediate_layers(len(vit.blocks), prune_norm=True, prune_head=True)
    return vit


def _require_vit(name: str) -> tuple[Size, bool]:
    """The model's patch size in pixels, and whether it takes images of any size (SAM's does)."""
    if not timm.is_model(name):
        plain = timm.list_models([f"{family}*" for family in ("vit", "deit", "beit", "eva", "samvit")])
        near = difflib.get_close_matches(name, plain, 3)
        raise RecipeError(
            "timm has no model of this name for a stem.",
            got=name,
            expected="a ViT of timm, such as vit_base_patch16_384",
            do=f"did you mean {' or '.join(near)}?" if near else "see timm.list_models('*vit*')",
        )
    with torch.device("meta"):  # the architecture alone, in milliseconds
        blank = timm.create_model(name)
    is_sam = isinstance(blank, VisionTransformerSAM)
    is_plain = isinstance(getattr(blank, "num_prefix_tokens", None), int) and hasattr(blank, "patch_embed")
    if not (is_plain or is_sam) or len(getattr(blank, "blocks", ())) < NUM_LEVELS:
        raise RecipeError(
            f"{name} cannot be a stem.",
            got=f"a {type(blank).__name__}",
            expected=f"a plain ViT: patch tokens of one width through at least {NUM_LEVELS} blocks",
            do="choose a vit_*, deit*, beit*, eva* or samvit_* model of timm",
        )
    rows, columns = blank.patch_embed.feat_ratio(as_scalar=False)
    return (rows, columns), is_sam
