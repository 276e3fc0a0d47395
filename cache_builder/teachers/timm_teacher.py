"""Any timm model with `forward_intermediates` as a teacher.

The same model by hand, random weights included:

    torch.manual_seed(spec.random_seed)
    model = timm.create_model(spec.model, pretrained=spec.pretrained, img_size=spec.image_size).eval()

without `img_size` for architectures that take any size: those for which
`timm.models.get_model_input_config(model)["fixed_input_size"]` is false (SAM, DINOv3, ConvNeXt).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.layers import PatchEmbed
from timm.models import get_model_input_config
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from cache_builder.teachers.base import Architecture, Outputs, Teacher, TeacherFeatures, preprocess
from pipeline.errors import TeacherInputError, WeightsNotFoundError
from pipeline.spec import Size, TeacherSpec


class TimmTeacher(Teacher):
    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__(spec)
        self.model = _create(spec).eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @classmethod
    @cache
    def models(cls) -> Collection[str]:
        return {*timm.list_models(), *timm.list_models(include_tags=True)}

    @classmethod
    def describe(cls, model: str) -> Architecture:
        blank = _blank(model)
        config = blank.pretrained_cfg
        embed = getattr(blank, "patch_embed", None)
        return Architecture(
            model=".".join(filter(None, (config["architecture"], config.get("tag")))),
            patch=embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1),
            mean=config["mean"],
            std=config["std"],
        )

    @classmethod
    def probe(cls, model: str, image_size: Size, global_feature: bool) -> Outputs:
        try:
            with torch.device("meta"), torch.inference_mode():
                blank = timm.create_model(model, **_size(model, image_size)).eval()
                final, maps = blank.forward_intermediates(torch.empty(1, 3, *image_size))
                # SAM was never trained to have a global feature: its head averages the mask decoder's input.
                global_feature &= not isinstance(blank, VisionTransformerSAM)
                global_width = blank.forward_head(final).shape[-1] if global_feature else None
        except Exception as reason:  # what timm trips over depends on the architecture
            raise TeacherInputError(
                f"timm cannot run {model} at this image size.",
                got=f"{image_size}: {type(reason).__name__}: {reason}",
                expected=f"a size that the architecture takes; it was made for {_native_size(model)}",
                do="set image_size for this teacher, or choose another model",
            ) from reason
        return Outputs(
            blocks=tuple((m.shape[1], (m.shape[2], m.shape[3])) for m in maps),
            has_cls_token=_has_cls_token(blank),
            global_width=global_width,
        )

    def forward(self, pixels_B3HW: Tensor) -> TeacherFeatures:
        spec = self.spec
        with torch.inference_mode(), _precision(spec, pixels_B3HW.device):
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


@cache
def _blank(model: str) -> Any:
    """`model` at its own size without weights: on the meta device it costs milliseconds."""
    with torch.device("meta"):
        blank = timm.create_model(model)
    if not hasattr(blank, "forward_intermediates"):
        raise TeacherInputError(
            f"timm cannot give the block outputs of {model}.",
            got="an architecture without forward_intermediates",
            expected="one with it: every ViT, ConvNeXt, Swin and ResNet has it",
            do="choose another model",
        )
    return blank


def _native_size(model: str) -> Size:
    size: Size = get_model_input_config(_blank(model))["input_size"][-2:]
    return size


def _size(model: str, image_size: Size) -> dict[str, Size]:
    return {"img_size": image_size} if get_model_input_config(_blank(model))["fixed_input_size"] else {}


def _has_cls_token(model: Any) -> bool:
    # CaiT and VOLO add their class token behind the blocks: no prefix tokens come with their maps.
    takes_prefix = "return_prefix_tokens" in signature(model.forward_intermediates).parameters
    return takes_prefix and getattr(model, "cls_token", None) is not None


def _precision(spec: TeacherSpec, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if spec.precision == "bfloat16" else nullcontext()


def _create(spec: TeacherSpec) -> Any:
    size = _size(spec.model, spec.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.random_seed)
        if not spec.pretrained:
            return timm.create_model(spec.model, pretrained=False, **size)
        overlay = {"file": spec.checkpoint} if spec.checkpoint else None
        with _recorded_keys(type(_blank(spec.model))) as wrong_keys:
            try:
                _require_source(spec)
                model = timm.create_model(spec.model, True, pretrained_cfg_overlay=overlay, **size)
            except Exception as reason:  # from the hub, the file system, safetensors or load_state_dict
                raise _weights_not_found(spec, f"{type(reason).__name__}: {reason}") from reason
    if spec.global_width is None:  # then nothing that is kept passes through the classifier
        heads = model.pretrained_cfg.get("classifier") or ()
        prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        wrong_keys = [key for key in wrong_keys if not key.split(" ")[1].startswith(prefixes)]
    if wrong_keys:
        raise _weights_not_found(spec, f"{len(wrong_keys)} keys that differ: {', '.join(wrong_keys[:8])}")
    return model


@contextmanager
def _recorded_keys(model_class: type[nn.Module]) -> Iterator[list[str]]:
    """Yields a list that receives every key missing from, or unexpected in, a loaded state dict.

    timm loads some families with `strict=False` and only logs what it left at random.
    """
    keys: list[str] = []

    def load_state_dict(self: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        result = nn.Module.load_state_dict(self, state_dict, strict=False, assign=assign)
        keys.extend(f"missing {key}" for key in result.missing_keys)
        keys.extend(f"unexpected {key}" for key in result.unexpected_keys)
        return result

    own = model_class.__dict__.get("load_state_dict")
    assert own is None, f"{model_class.__name__} loads its weights in its own way"
    model_class.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield keys
    finally:
        del model_class.load_state_dict


def _require_source(spec: TeacherSpec) -> None:
    """Fail in seconds where `hf_hub_download` would retry for minutes before it gives up."""
    if spec.checkpoint:
        if not Path(spec.checkpoint).is_file():
            raise FileNotFoundError(f"{spec.checkpoint} is not a file")
        return
    repository, name = _blank(spec.model).pretrained_cfg.get("hf_hub_id"), "model.safetensors"
    if not repository or isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str):
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name))
    except EntryNotFoundError:
        return  # the hub answered; timm knows the other file names


def _weights_not_found(spec: TeacherSpec, got: str) -> WeightsNotFoundError:
    source = spec.checkpoint or "the Hugging Face hub"
    return WeightsNotFoundError(
        f"The pretrained weights of {spec.model} could not be had from {source}.",
        got=got,
        expected="every weight but the classifier's, from a file or from a hub that answers",
        do="pass a file (teachers.<name>.checkpoint=/path/model.safetensors), "
        "or take random weights (teachers.<name>.pretrained=false)",
    )
