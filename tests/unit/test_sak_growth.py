"""From student to student: teachers that come and go (SAK, D.4), stage 1 into stage 2, the authors' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pipeline.errors import CheckpointError, RecipeError
from student import SAK, build_student, load_stage_1, load_student
from student.sak.reference import load_reference

TASKS = {"semseg": 5, "parts": 7, "saliency": 2, "boundary": 1}


def tiny(seed: int = 0, **changes: Any) -> SAK:
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "stem": "test_vit",
        "teacher_dims": {"a": 64, "b": 48},
        "image_size": (64, 96),
    }
    student = build_student("sak", **arguments | changes)
    assert isinstance(student, SAK)
    return student.eval()


def same_maps(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]], teachers: str) -> bool:
    return all(torch.equal(x, y) for name in teachers for x, y in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("adapter_paths", [True, False])
def test_a_new_teacher_does_not_touch_the_others(adapter_paths: bool, tmp_path: Path) -> None:
    student = tiny(adapter_paths=adapter_paths)
    pixels_B3HW = torch.randn(2, 3, 64, 96)
    before = student(pixels_B3HW)
    student.add_teacher("c", 32)
    assert [tuple(level.shape) for level in student(pixels_B3HW)["c"]] == [(2, 32, 4, 6)] * 4
    trained = [p for p in student.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in student.paths["c"].parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    new = student.train()(pixels_B3HW)["c"]
    torch.stack([level.square().mean() for level in new]).sum().backward()
    optimizer.step()
    after = student.eval()(pixels_B3HW)
    assert same_maps(before, after, "ab")
    assert not torch.equal(new[0], after["c"][0])
    student.save_pretrained(tmp_path)
    loaded = load_student(tmp_path)
    assert loaded.teachers == ["a", "b", "c"]
    assert same_maps(after, loaded(pixels_B3HW), "abc")


def test_a_teacher_that_goes_does_not_touch_the_others(tmp_path: Path) -> None:
    student = tiny(teacher_dims={"a": 64, "b": 48, "c": 32})
    pixels_B3HW = torch.randn(2, 3, 64, 96)
    before = student(pixels_B3HW)
    student.remove_teacher("b")
    assert student.teachers == ["a", "c"]
    assert student(pixels_B3HW).keys() == {"a", "c"}
    student.save_pretrained(tmp_path)
    assert same_maps(before, load_student(tmp_path)(pixels_B3HW), "ac")


def test_what_cannot_be_added_or_removed_says_why() -> None:
    student = tiny()
    with pytest.raises(RecipeError, match="already"):
        student.add_teacher("a", 64)
    with pytest.raises(RecipeError, match="letters, digits"):
        student.add_teacher("a.b", 64)
    with pytest.raises(RecipeError, match="no teacher of this student"):
        student.remove_teacher("c")
    student.remove_teacher("a")
    with pytest.raises(RecipeError, match="needs a teacher"):
        student.remove_teacher("b")
    assert student.teachers == ["b"]
    for change in (lambda s: s.add_teacher("c", 64), lambda s: s.remove_teacher("a")):
        with pytest.raises(RecipeError, match="change the student of stage 1"):
            change(tiny(tasks=TASKS))


def test_stage_1_is_loaded_into_stage_2(tmp_path: Path) -> None:
    stage_1 = tiny(seed=1)
    stage_1.mean += 0.25
    stage_1.save_pretrained(tmp_path)
    stage_2 = tiny(seed=2, tasks=TASKS)
    heads = {name: t.clone() for name, t in stage_2.state_dict().items() if name.startswith("decoder.")}
    load_stage_1(stage_2, tmp_path)
    pixels_B3HW = torch.randn(1, 3, 64, 96)
    assert same_maps(stage_1(pixels_B3HW), stage_2(pixels_B3HW, full=True).feature_maps, "ab")
    images_B3HW = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(stage_1.normalize(images_B3HW), stage_2.normalize(images_B3HW))
    loaded = stage_2.state_dict()
    assert heads
    assert all(torch.equal(loaded[name], tensor) for name, tensor in heads.items())


def test_position_embeddings_are_resampled(tmp_path: Path) -> None:
    stage_1 = tiny(seed=1, image_size=(48, 48))
    stage_1.save_pretrained(tmp_path)
    stage_2 = tiny(seed=2, image_size=(64, 96), tasks=TASKS)
    load_stage_1(stage_2, tmp_path)
    old, new = stage_1.state_dict(), stage_2.state_dict()
    expected = resample_abs_pos_embed(old.pop("stem.vit.pos_embed"), new_size=[4, 6], old_size=[3, 3])
    assert torch.equal(new["stem.vit.pos_embed"], expected)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize(
    "stem", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224"]
)
def test_stems_with_other_positions_are_resampled_too(stem: str, tmp_path: Path) -> None:
    patch = 14 if "14" in stem else 16
    with torch.device("meta"):
        wanted = tiny(stem=stem, image_size=(6 * patch, 4 * patch)).state_dict()
        stage_1 = tiny(stem=stem, image_size=(3 * patch, 3 * patch))
        stage_1.stem.resize((6 * patch, 4 * patch))
    resized = stage_1.state_dict()
    assert stage_1.stem.grid == (6, 4)
    assert {name: t.shape for name, t in resized.items()} == {name: t.shape for name, t in wanted.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_dims": {"a": 64, "c": 48}}, r"missing: paths\.c\.adapters.* unknown: paths\.b\.adapters"),
        ({"teacher_dims": {"a": 64}}, r"unknown: paths\.b\.adapters\.0\.down\.bias"),
        ({"teacher_dims": {"a": 64, "b": 32}}, r"of another shape: paths\.b\.aligners\.0\.bias"),
        ({"reduction": 8}, r"of another shape: paths\.a\.adapters\.0\.down\.bias"),
        ({"adapter_paths": False, "fusion": "sum"}, r"missing: paths\.a\.aligners.* unknown: paths\.a\.ad"),
        ({"stem": "test_vit2"}, r"of another shape|unknown: .*stem\.vit"),
    ],
)  # fmt: skip
def test_a_stage_1_that_does_not_fit_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    stage_2 = tiny(seed=2, tasks=TASKS, **changes)
    before = {name: tensor.clone() for name, tensor in stage_2.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_stage_1(stage_2, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage_2.state_dict().items())


def authors_names(student: SAK, backbone: str) -> dict[str, str]:
    """{their name: ours} of every tensor, written the way their modules are nested."""
    state, names = student.state_dict(), {}
    for ours in state:
        if ours.startswith("stem.vit."):
            names[backbone + ours.removeprefix("stem.")] = ours
    for teacher in student.teachers:
        for index in range(7):
            for rest in ("down.weight", "down.bias", "up.weight", "up.bias", "scale"):
                names[f"{backbone}tsap.{teacher}.{index}.{rest}"] = f"paths.{teacher}.adapters.{index}.{rest}"
        for level, block in enumerate((1, 2, 4, 5)):  # of six blocks
            for rest in ("weight", "bias"):
                key = f"{block}_{teacher}.{rest}"
                names[f"{backbone}out_norms.{key}"] = f"paths.{teacher}.output_norms.{level}.{rest}"
                if teacher == "b":
                    names[f"{backbone}ts_aligners.{key}"] = f"paths.{teacher}.aligners.{level}.{rest}"
    tasks = {"semseg": "semseg", "human_parts": "parts", "sal": "saliency", "edge": "boundary"}
    for theirs, task in tasks.items() if student.tasks else ():
        for level, block in enumerate((1, 2, 4, 5)):
            for rest in ("weight", "bias"):
                for layer in (0, 1, 3):
                    names[f"{backbone}mor.{block}_{theirs}.router.module.{layer}.{rest}"] = (
                        f"decoder.routers.{task}.{level}.mlp.{layer}.{rest}"
                    )
                names[f"heads.{theirs}.linears.{level}.{rest}"] = (
                    f"decoder.heads.{task}.linears.{level}.{rest}"
                )
        for rest in ("weight", "bias"):
            names[f"heads.{theirs}.linear_fuse.0.{rest}"] = f"decoder.heads.{task}.fuse.0.{rest}"
            names[f"heads.{theirs}.last_conv.{rest}"] = f"decoder.heads.{task}.predict.{rest}"
        for rest in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"heads.{theirs}.linear_fuse.1.{rest}"] = f"decoder.heads.{task}.fuse.1.{rest}"
    assert set(names.values()) == state.keys() - {"mean", "std"}
    return names


@pytest.mark.parametrize(("tasks", "backbone"), [({}, ""), (TASKS, "backbone.")])
def test_the_authors_checkpoints_are_loaded_by_their_names(tasks: dict[str, int], backbone: str) -> None:
    theirs = tiny(seed=1, tasks=tasks)
    state = theirs.state_dict()
    checkpoint = {name: state[ours] for name, ours in authors_names(theirs, backbone).items()}
    student = tiny(seed=2, tasks=tasks)
    load_reference(student, checkpoint)
    loaded = student.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state.keys() - {"mean", "std"})
    torch.testing.assert_close(loaded["mean"].flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(loaded["std"].flatten(), torch.tensor([0.229, 0.224, 0.225]))


def test_tensors_of_the_authors_that_do_not_fit_are_named() -> None:
    theirs = tiny(seed=1, tasks=TASKS)
    state = theirs.state_dict()
    checkpoint = {name: state[ours] for name, ours in authors_names(theirs, "backbone.").items()}
    scale = checkpoint.pop("backbone.tsap.a.0.scale")
    checkpoint["backbone.vit.lora.weight"] = checkpoint["backbone.out_norms.3_a.weight"] = scale
    checkpoint["heads.sal.last_conv.bias"] = scale
    with pytest.raises(CheckpointError) as error:
        load_reference(tiny(seed=2, tasks=TASKS), checkpoint)
    for part in (
        "missing: paths.a.adapters.0.scale;",
        "unknown: paths.a.output_norms.block_3.weight, stem.vit.lora.weight;",
        "of another shape: decoder.heads.saliency.predict.bias",
    ):
        assert part in str(error.value)
