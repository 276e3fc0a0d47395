"""A timm model, with its weights or without any.

The same model by hand, random weights included:

    torch.manual_seed(spec.random_seed)
    model = timm.create_model(spec.model, pretrained=spec.pretrained, img_size=spec.image_size).eval()

without `img_size` for architectures that take any size: those for which
`timm.models.get_model_input_config(model)["fixed_input_size"]` is false (SAM, DINOv3, ConvNeXt).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import get_model_input_config
from torch import nn

from pipeline.errors import TeacherInputError, WeightsNotFoundError
from pipeline.spec import Size, TeacherSpec

_ONE_AT_A_TIME = threading.Lock()  # what it needs, torch's generator and timm's classes, all threads share


@cache
def blank_model(model: str) -> Any:
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


def native_size(model: str) -> Size:
    size: Size = get_model_input_config(blank_model(model))["input_size"][-2:]
    return size


def size_argument(model: str, image_size: Size) -> dict[str, Size]:
    """What `timm.create_model` must be told of the image size."""
    return {"img_size": image_size} if get_model_input_config(blank_model(model))["fixed_input_size"] else {}


def create_model(spec: TeacherSpec) -> Any:
    """The model of `spec`, on the CPU. Raises `WeightsNotFoundError`."""
    size = size_argument(spec.model, spec.image_size)
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.random_seed)
        if not spec.pretrained:
            return timm.create_model(spec.model, pretrained=False, **size)
        overlay = {"file": spec.checkpoint} if spec.checkpoint else None
        with _recorded_keys(type(blank_model(spec.model))) as wrong_keys:
            try:
                _require_source(spec)
                model = timm.create_model(spec.model, pretrained=True, pretrained_cfg_overlay=overlay, **size)
            except Exception as reason:  # from the hub, the file system, safetensors or load_state_dict
                raise _weights_not_found(spec, f"{type(reason).__name__}: {reason}") from reason
    if spec.global_width is None:  # then nothing that is kept passes through the classifier
        heads = model.pretrained_cfg.get("classifier") or ()
        prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        wrong_keys = [(what, key) for what, key in wrong_keys if not key.startswith(prefixes)]
    if wrong_keys:
        first = ", ".join(f"{what} {key}" for what, key in wrong_keys[:8])
        raise _weights_not_found(spec, f"{len(wrong_keys)} keys that differ: {first}")
    return model


@contextmanager
def _recorded_keys(model_class: type[nn.Module]) -> Iterator[list[tuple[str, str]]]:
    """Yields a list that receives every ("missing", key) and ("unexpected", key) of a loaded state dict.

    timm loads some families with `strict=False` and only logs what it left at random.
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


def _require_source(spec: TeacherSpec) -> None:
    """Fail in seconds where `hf_hub_download` would retry for minutes before it gives up."""
    if spec.checkpoint:
        if not Path(spec.checkpoint).is_file():
            raise FileNotFoundError(f"{spec.checkpoint} is not a file")
        return
    repository, name = blank_model(spec.model).pretrained_cfg.get("hf_hub_id"), "model.safetensors"
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
