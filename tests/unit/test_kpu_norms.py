"""The ViT-Adapter with the original's norm: its size, its buffers, and the weights of its authors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from teachercache.pipeline.errors import CheckpointError
from teachercache.student.build import load_student
from teachercache.student.kpu.reference import load_vit_adapter
from teachercache.student.kpu.vit_adapter import ViTAdapter
from teachercache.student.training.train import train
from tests.make_cache import make_cache, make_images, teacher_spec
from tests.train_recipes import logged, train_recipe

Shapes = Iterator[tuple[str, tuple[int, ...]]]
WIDTH = 128
NORMED = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def reference_shapes(width: int, heads: int) -> Shapes:
    """Names and shapes of `ViTAdapter` in ViTDet's and UPerNet's configurations of the authors' code, with
    what a checkpoint holds beside it."""
    yield "level_embed", (3, width)
    for module, channels in (("stem.1", 64), ("stem.4", 64), ("stem.7", 64), ("conv2.1", 128)):
        yield from batch_norm(f"spm.{module}", channels)
    for module in ("conv3.1", "conv4.1"):
        yield from batch_norm(f"spm.{module}", 256)
    for module, before, after in (
        *(("stem.0", 3, 64), ("stem.3", 64, 64), ("stem.6", 64, 64), ("conv2.0", 64, 128)),
        *(("conv3.0", 128, 256), ("conv4.0", 256, 256)),
    ):
        yield f"spm.{module}.weight", (after, before, 3, 3)
    for number, channels in enumerate((64, 128, 256, 256), start=1):
        yield f"spm.fc{number}.weight", (width, channels, 1, 1)
        yield f"spm.fc{number}.bias", (width,)
        yield from batch_norm(f"norm{number}", width)
    for block in range(4):
        yield f"interactions.{block}.injector.gamma", (width,)
        yield from attention(f"interactions.{block}.injector", width, heads, maps=3)
        extra = [f"extra_extractors.{number}" for number in (0, 1) if block == 3]
        for extractor in ("extractor", *extra):
            yield from attention(f"interactions.{block}.{extractor}", width, heads, maps=1)
            for layer, shape in (
                *(("ffn_norm", (width,)), ("ffn.fc1", (width // 4, width))),
                *(("ffn.dwconv.dwconv", (width // 4, 1, 3, 3)), ("ffn.fc2", (width, width // 4))),
            ):
                yield f"interactions.{block}.{extractor}.{layer}.weight", shape
                yield f"interactions.{block}.{extractor}.{layer}.bias", shape[:1]
    yield "up.weight", (width, width, 2, 2)
    yield "up.bias", (width,)


def batch_norm(name: str, channels: int) -> Shapes:
    for tensor in NORMED:
        yield f"{name}.{tensor}", () if tensor == "num_batches_tracked" else (channels,)


def attention(name: str, width: int, heads: int, maps: int) -> Shapes:
    for norm in ("query_norm", "feat_norm"):
        yield f"{name}.{norm}.weight", (width,)
        yield f"{name}.{norm}.bias", (width,)
    places = heads * maps * 4
    for layer, after, before in (
        *(("sampling_offsets", 2 * places, width), ("attention_weights", places, width)),
        *(("value_proj", width // 2, width), ("output_proj", width, width // 2)),
    ):
        yield f"{name}.attn.{layer}.weight", (after, before)
        yield f"{name}.attn.{layer}.bias", (after,)


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"backbone.{name}": torch.randn(shape, generator=generator)
        for name, shape in reference_shapes(WIDTH, heads=2)
    }
    of_others = "backbone.pos_embed", "backbone.blocks.0.norm1.weight", "decode_head.conv_seg.weight"
    return tensors | {name: torch.zeros(3) for name in of_others}


def test_the_authors_weights_are_loaded_by_their_names() -> None:
    adapter, tensors = ViTAdapter(WIDTH, [1, 2, 3, 4], norm="sync_batch"), checkpoint()
    load_vit_adapter(adapter, tensors)
    own = adapter.state_dict()
    for name, theirs in {
        "prior.stem.1.1.running_var": "spm.stem.4.running_var",
        "prior.stages.2.0.weight": "spm.conv4.0.weight",
        "prior.projections.0.bias": "spm.fc1.bias",
        "scale_embedding": "level_embed",
        "injectors.2.attention.offsets.weight": "interactions.2.injector.attn.sampling_offsets.weight",
        "injectors.0.feature_norm.bias": "interactions.0.injector.feat_norm.bias",
        "extractors.1.0.attention.values.weight": "interactions.1.extractor.attn.value_proj.weight",
        "extractors.3.0.ffn.depthwise.weight": "interactions.3.extractor.ffn.dwconv.dwconv.weight",
        "extractors.3.2.ffn.leave.bias": "interactions.3.extra_extractors.1.ffn.fc2.bias",
        "norms.3.running_mean": "norm4.running_mean",
        "up.weight": "up.weight",
    }.items():
        assert own[name].equal(tensors[f"backbone.{theirs}"]), name
    values = {tuple(tensor.flatten()[:4].tolist()) for tensor in own.values() if tensor.numel() > 1}
    assert len(values) == sum(tensor.numel() > 1 for tensor in own.values()), "no tensor was taken twice"


@pytest.mark.parametrize("change", ["group", "missing"])
def test_weights_that_are_not_all_of_the_adapter_s_are_refused(change: str) -> None:
    tensors = checkpoint()
    adapter = ViTAdapter(WIDTH, [1, 2, 3, 4], norm="group" if change == "group" else "sync_batch")
    if change == "missing":
        del tensors["backbone.spm.fc3.bias"]
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    with pytest.raises(CheckpointError, match="sync_batch") as error:
        load_vit_adapter(adapter, tensors)
    assert ("running_mean" if change == "group" else "prior.projections.2.bias") in str(error.value)
    assert len(str(error.value)) < 500
    assert all(tensor.equal(before[name]) for name, tensor in adapter.state_dict().items())


def test_batch_norms_have_as_many_parameters_as_the_paper_counts() -> None:
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in ViTAdapter(768, [3, 6, 9, 12], norm=norm).parameters())
            for norm in ("group", "sync_batch")
        ]
    assert counts == [13_680_608, 13_680_608]


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_buffers_of_batch_norms_are_in_checkpoints_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    teachers = {"a": teacher_spec(cls_token=True), "b": teacher_spec(width=4, grid=9)}
    images = make_images(tmp_path / "images", 8)
    make_cache(tmp_path / "cache", images, teachers=teachers, view_size=(64, 64))
    student = {"kind": "kpu", "stem": "test_vit", "pretrained": False, "norm": "sync_batch"}
    settings: dict[str, Any] = {"student": student, "schedule": {"max_steps": 5}}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(train_recipe(tmp_path / "cache", whole, **settings))
    name = "checkpoints/step_00000003"
    shutil.copytree(whole / name, resumed / name)
    shutil.copy(whole / "metrics.jsonl", resumed)
    train(train_recipe(tmp_path / "cache", resumed, **settings))
    assert logged(resumed) == logged(whole)
    saved, expected = (load_file(run / "student/model.safetensors") for run in (resumed, whole))
    assert all(saved[name].equal(tensor) for name, tensor in expected.items())
    statistics = "vit_adapter.prior.stem.0.1.running_mean"
    assert load_file(whole / name / "model.safetensors")[statistics].any()
    assert load_student(whole / "student").state_dict()[statistics].equal(expected[statistics])


def test_a_norm_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="only a ViT-Adapter has such a norm"):
        train_recipe("cache", "run", student={"kind": "kpu", "preservation": False, "norm": "sync_batch"})
