"""Any timm model with `forward_intermediates` as a teacher."""

from collections.abc import Collection, Iterable
from functools import cache
from inspect import signature
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from teachercache.cache_builder.teachers.sam_attention import fold_positions
from teachercache.cache_builder.teachers.teacher import (
    Architecture,
    Outputs,
    Teacher,
    TeacherFeatures,
    autocast,
    preprocess,
)
from teachercache.cache_builder.teachers.timm_model import (
    blank_model,
    create_model,
    native_size,
    size_argument,
)
from teachercache.pipeline.errors import TeacherInputError
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size

_LAYER_SCALES = (".ls1.gamma", ".gamma_1")  # of a ViT, and of timm's Eva and BEiT


class TimmTeacher(Teacher):
    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__(spec)
        self.model = create_model(spec).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        fold_positions(self.model, spec.native_grid)

    @classmethod
    @cache
    def models(cls) -> Collection[str]:
        return {*timm.list_models(), *timm.list_models(include_tags=True)}

    @classmethod
    def describe(cls, model: str) -> Architecture:
        blank = blank_model(model)
        config = blank.pretrained_cfg
        embed = getattr(blank, "patch_embed", None)
        return Architecture(
            model=".".join(filter(None, (config["architecture"], config.get("tag")))),
            patch=embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1),
            mean=config["mean"],
            std=config["std"],
            has_positions=isinstance(blank, VisionTransformer) and blank.pos_embed is not None,
            has_layer_scale=any(name.endswith(_LAYER_SCALES) for name, _ in blank.named_parameters()),
        )

    @classmethod
    def probe(cls, model: str, image_size: Size, global_feature: bool) -> Outputs:
        try:
            with torch.device("meta"), torch.inference_mode():
                blank = timm.create_model(model, **size_argument(model, image_size)).eval()
                final, maps = blank.forward_intermediates(torch.empty(1, 3, *image_size))
                # SAM was never trained for a global feature: its head averages the mask decoder's input.
                global_feature &= not isinstance(blank, VisionTransformerSAM)
                global_width = blank.forward_head(final).shape[-1] if global_feature else None
        except Exception as reason:  # the error depends on the architecture
            raise TeacherInputError(
                f"timm cannot run {model} at this image size.",
                got=f"{image_size}: {type(reason).__name__}: {reason}",
                expected=f"a size that the architecture takes; it was made for {native_size(model)}",
                do="set image_size for this teacher, or choose another model",
            ) from reason
        return Outputs(
            blocks=tuple((m.shape[1], (m.shape[2], m.shape[3])) for m in maps),
            has_cls_token=_has_cls_token(blank),
            global_width=global_width,
        )

    def repeated_parts(self) -> Iterable[nn.Module]:
        names = (name for name in ("blocks", "stages", "layers") if hasattr(self.model, name))
        return getattr(self.model, next(names, ""), ())

    def forward(self, pixels_B3HW: Tensor) -> TeacherFeatures:
        spec = self.spec
        with torch.inference_mode(), autocast(spec, pixels_B3HW.device):
            images = preprocess(pixels_B3HW, spec).contiguous(memory_format=torch.channels_last)
            result = self.model.forward_intermediates(
                images,
                indices=list(spec.block_indices),
                norm=False,
                stop_early=spec.global_width is None,
                intermediates_only=spec.global_width is None,
                **({"return_prefix_tokens": True} if spec.cls_token else {}),
            )
            levels, pooled = result, None
            if spec.global_width is not None:
                final, levels = result
                pooled = self.model.forward_head(final)
        maps, prefixes = zip(*levels, strict=True) if spec.cls_token else (levels, None)
        # Copied outside inference mode: a loss may then save these tensors for its backward pass.
        return TeacherFeatures(
            feature_maps_BSHWC=torch.stack([m.permute(0, 2, 3, 1) for m in maps], dim=1),
            cls_token_BSC=None if prefixes is None else torch.stack([p[:, 0] for p in prefixes], dim=1),
            global_feature_BD=None if pooled is None else pooled.clone(),
        )


def _has_cls_token(model: Any) -> bool:
    # CaiT and VOLO add their class token after the blocks: their maps come without prefix tokens.
    takes_prefix = "return_prefix_tokens" in signature(model.forward_intermediates).parameters
    return takes_prefix and getattr(model, "cls_token", None) is not None
