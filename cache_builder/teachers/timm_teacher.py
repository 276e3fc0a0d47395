"""Any timm model with `forward_intermediates` as a teacher.

To make the same model by hand, even with random weights:

    torch.manual_seed(spec.random_seed)
    model = timm.create_model(spec.model, pretrained=spec.pretrained, img_size=spec.image_size).eval()

Leave out `img_size` for architectures that take any size: those for which
`timm.models.get_model_input_config(model)["fixed_input_size"]` is false (SAM, DINOv3, ConvNeXt).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from inspect import signature
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import get_model_input_config
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
from teachercache.cache_builder.teachers.weights import (
    inner_weights,
    loading,
    require_file,
    require_hub,
    seeded,
)
from teachercache.pipeline.errors import TeacherInputError, WeightsNotFoundError
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size

_EXPECTED = "every weight but the classifier's"
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
            native = get_model_input_config(blank_model(model))["input_size"][-2:]
            raise TeacherInputError(
                f"timm cannot run {model} at this image size.",
                got=f"{image_size}: {type(reason).__name__}: {reason}",
                expected=f"a size that the architecture takes; it was made for {native}",
                do="set image_size for this teacher, or choose another model",
            ) from reason
        # CaiT and VOLO add their class token after the blocks: their maps come without prefix tokens.
        takes_prefix = "return_prefix_tokens" in signature(blank.forward_intermediates).parameters
        return Outputs(
            blocks=tuple((m.shape[1], (m.shape[2], m.shape[3])) for m in maps),
            has_cls_token=takes_prefix and getattr(blank, "cls_token", None) is not None,
            global_width=global_width,
        )

    def repeated_parts(self) -> Iterable[nn.Module]:
        names = (name for name in ("blocks", "stages", "layers") if hasattr(self.model, name))
        return getattr(self.model, next(names, ""), ())

    def features(self, pixels_B3HW: Tensor, specs: Sequence[TeacherSpec]) -> list[TeacherFeatures]:
        (spec,) = specs
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
        features = TeacherFeatures(
            feature_maps_BSHWC=torch.stack([m.permute(0, 2, 3, 1) for m in maps], dim=1),
            cls_token_BSC=None if prefixes is None else torch.stack([p[:, 0] for p in prefixes], dim=1),
            global_feature_BD=None if pooled is None else pooled.clone(),
        )
        return [features]


@cache
def blank_model(model: str) -> Any:
    """`model` at its own size, without weights, which takes milliseconds on the meta device."""
    with torch.device("meta"):
        blank = timm.create_model(model)
    if not hasattr(blank, "forward_intermediates"):
        raise TeacherInputError(
            f"timm cannot return the block outputs of {model}.",
            got="an architecture without forward_intermediates",
            expected="an architecture with it, such as any ViT, ConvNeXt, Swin or ResNet",
            do="choose another model",
        )
    return blank


def size_argument(model: str, image_size: Size) -> dict[str, Size]:
    """The arguments that tell `timm.create_model` the image size."""
    return {"img_size": image_size} if get_model_input_config(blank_model(model))["fixed_input_size"] else {}


def create_model(spec: TeacherSpec) -> Any:
    """The model of `spec`, on the CPU. Raises `WeightsNotFoundError`."""
    if not spec.pretrained:
        with seeded(spec.random_seed):
            size = size_argument(spec.model, spec.image_size)
            scale = {} if spec.layer_scale is None else {"init_values": spec.layer_scale}
            return timm.create_model(spec.model, pretrained=False, **size, **scale)
    if not spec.checkpoint:
        return _load(spec, None)
    try:
        return _load(spec, {"file": spec.checkpoint})
    except WeightsNotFoundError:
        weights = None
        with suppress(Exception):  # timm has met and logged it too
            weights = inner_weights(spec.checkpoint, blank_model(spec.model).state_dict())
        if weights is None:
            raise
    model = _load(spec, {"state_dict": weights})
    del model.pretrained_cfg["state_dict"]
    return model


def _load(spec: TeacherSpec, overlay: dict[str, Any] | None) -> Any:
    """The model with the weights that `overlay` names to timm, or those of the hub."""
    size = size_argument(spec.model, spec.image_size) if spec.resample_positions == "antialias" else {}
    with loading(spec, _EXPECTED) as wrong_keys, _recorded_keys(type(blank_model(spec.model))) as keys:
        if spec.checkpoint:
            require_file(spec.checkpoint)
        elif repository := blank_model(spec.model).pretrained_cfg.get("hf_hub_id"):
            require_hub(repository)
        model = timm.create_model(spec.model, pretrained=True, pretrained_cfg_overlay=overlay, **size)
        # Without a global feature, no stored feature passes through the classifier.
        heads = (model.pretrained_cfg.get("classifier") or ()) if spec.global_width is None else ()
        prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        wrong_keys += [(what, key) for what, key in keys if not key.startswith(prefixes)]
    if spec.resample_positions == "plain":
        _resample_plainly(model, spec.image_size)
    return model


def _resample_plainly(model: Any, image_size: Size) -> None:
    """Positions as the authors of DINOv2 and Transformers fit them: bicubic, without timm's antialiasing."""
    native, prefix_tokens = model.pos_embed, 0 if model.no_embed_class else model.num_prefix_tokens
    model.set_input_size(image_size)
    grid = model.patch_embed.grid_size
    model.pos_embed = nn.Parameter(resample_abs_pos_embed(native, grid, None, prefix_tokens, antialias=False))


@contextmanager
def _recorded_keys(model_class: type[nn.Module]) -> Iterator[list[tuple[str, str]]]:
    """Yields a list that receives every ("missing", key) and ("unexpected", key) of a loaded state dict.

    timm loads some families with `strict=False` and only logs which weights stay random.
    """
    keys: list[tuple[str, str]] = []
    original = model_class.load_state_dict

    def load_state_dict(self: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        result = original(self, state_dict, strict=False, assign=assign)
        keys.extend(("missing", key) for key in result.missing_keys)
        keys.extend(("unexpected", key) for key in result.unexpected_keys)
        return result

    model_class.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield keys
    finally:
        model_class.load_state_dict = original  # type: ignore[method-assign]
