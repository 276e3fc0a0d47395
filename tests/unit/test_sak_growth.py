"""From student to student: teachers that come and go (SAK, D.4), stage 1 into stage 2, the authors' names."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from teachercache.pipeline.errors import CheckpointError, RecipeError
from teachercache.student.build import build_student, load_student
from teachercache.student.sak.model import SAK
from teachercache.student.sak.reference import load_reference, read_reference, reference_arguments
from teachercache.student.sak.transfer import load_stage_1

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


@pytest.mark.parametrize("compat", [False, True])
def test_stage_2_does_not_see_other_pixels_than_its_recipe_says(tmp_path: Path, compat: bool) -> None:
    tiny(sak_compat=not compat).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"(?s)sak_compat: {compat}.*sak_compat={str(not compat).lower()}"):
        load_stage_1(tiny(tasks=TASKS, sak_compat=compat), tmp_path)


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
    blocks = {6: (1, 2, 4, 5), 12: (2, 5, 8, 11)}[student.stem.depth]
    for ours in state:
        if ours.startswith("stem.vit."):
            names[backbone + ours.removeprefix("stem.")] = ours
    for teacher in student.teachers:
        for index in range(student.stem.depth + 1):
            for rest in ("down.weight", "down.bias", "up.weight", "up.bias", "scale"):
                names[f"{backbone}tsap.{teacher}.{index}.{rest}"] = f"paths.{teacher}.adapters.{index}.{rest}"
        for level, block in enumerate(blocks):
            for rest in ("weight", "bias"):
                key = f"{block}_{teacher}.{rest}"
                names[f"{backbone}out_norms.{key}"] = f"paths.{teacher}.output_norms.{level}.{rest}"
                if teacher == "b":
                    names[f"{backbone}ts_aligners.{key}"] = f"paths.{teacher}.aligners.{level}.{rest}"
    renamed = {"parts": "human_parts", "saliency": "sal", "boundary": "edge"}
    for task in student.tasks:
        theirs = renamed.get(task, task)
        for level, block in enumerate(blocks):
            for rest in ("weight", "bias"):
                for layer in (0, 1, 3) if student.config["fusion"] == "mor" else ():
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
    assert load_reference(student, checkpoint) == []
    loaded = student.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state.keys() - {"mean", "std"})
    torch.testing.assert_close(loaded["mean"].flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(loaded["std"].flatten(), torch.tensor([0.229, 0.224, 0.225]))


def test_of_the_authors_tensors_those_that_agree_are_loaded_and_the_others_named() -> None:
    theirs = tiny(seed=1, tasks=TASKS)
    state = theirs.state_dict()
    names = authors_names(theirs, "backbone.")
    checkpoint = {name: state[ours] for name, ours in names.items()}
    scale = checkpoint.pop("backbone.tsap.a.0.scale")
    checkpoint["backbone.vit.lora.weight"] = checkpoint["backbone.out_norms.3_a.weight"] = scale
    checkpoint["vit.cls_token"] = torch.zeros(1, 1, 64)  # a second tensor for one of the student's
    checkpoint["heads.sal.last_conv.bias"] = torch.zeros(3)
    student = tiny(seed=2, tasks=TASKS)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert {(u.kind, *u) for u in load_reference(student, checkpoint)} == {
        ("missing", "paths.a.adapters.0.scale", (1,), None),
        ("unexpected", "backbone.vit.lora.weight", None, (1,)),
        ("unexpected", "backbone.out_norms.3_a.weight", None, (1,)),
        ("unexpected", "vit.cls_token", None, (1, 1, 64)),
        ("other shape", "decoder.heads.saliency.predict.bias", (2,), (3,)),
    }
    left = {"paths.a.adapters.0.scale", "decoder.heads.saliency.predict.bias"}
    for name, tensor in student.state_dict().items():
        if name not in ("mean", "std"):
            assert torch.equal(tensor, before[name] if name in left else state[name]), name


def test_a_stage_1_of_the_authors_gives_a_student_with_tasks_all_but_routers_and_heads() -> None:
    theirs = tiny(seed=1)
    state = theirs.state_dict()
    checkpoint = {name: state[ours] for name, ours in authors_names(theirs, "").items()}
    student = tiny(seed=2, tasks=TASKS)
    unmatched = load_reference(student, checkpoint)
    assert {u.kind for u in unmatched} == {"missing"}
    assert {u.name for u in unmatched} == {n for n in student.state_dict() if n.startswith("decoder.")}


def test_tensors_of_which_none_is_the_students_are_refused() -> None:
    student = tiny()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"layer1\.0\.conv1\.weight \(3, 3\), vit\.cls_token \(1, 1, 8\)"
    ):
        load_reference(
            student, {"layer1.0.conv1.weight": torch.ones(3, 3), "vit.cls_token": torch.ones(1, 1, 8)}
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_checkpoint_of_the_authors_is_read_without_unpickling(tmp_path: Path) -> None:
    path, tensors = tmp_path / "checkpoint.pth", {"vit.cls_token": torch.ones(1, 1, 8)}
    torch.save({"model": tensors, "epoch": 3, "optimizer": {"state": {}}}, path)
    assert read_reference(path).keys() == tensors.keys()
    torch.save(tensors, path)
    assert read_reference(path)["vit.cls_token"].equal(tensors["vit.cls_token"])

    made = tmp_path / "made"
    torch.save({"model": Touch(made)}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_reference(path)
    assert not made.exists()
    for content in (b"", b"PK no zip", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_reference(path)
    for other in ({}, [1], {"model": {"a": 1}}, {"model": None}):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="names and tensors"):
            read_reference(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_reference(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got:      an empty file"),
        (b"hello world", "starts with b'hello world'"),
        (pickle.dumps({"a": 1}), r"a file that starts with b'\x80"),
    ],
)
def test_junk_is_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "junk.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_reference(tmp_path / "junk.pth")
    assert "weights_only" not in str(caught.value)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, None),
        ({"image_size": (64, 32), "tasks": TASKS}, (64, 32)),
        ({"reduction": 8, "tasks": {"semseg": 3}, "fusion": "sum"}, None),
        ({"teacher_dims": {}, "tasks": {"depth": 1}, "fusion": "sum"}, None),
    ],
)
def test_the_shapes_of_a_checkpoint_tell_the_student(
    changes: dict[str, Any], size: tuple[int, int] | None
) -> None:
    expected: dict[str, Any] = {
        "stem": "vit_small_patch16_384",
        "teacher_dims": {"sam": 384, "b": 48},
        "image_size": (64, 64),
        "reduction": 4,
        "tasks": {},
        "fusion": "mor",
    } | changes
    with torch.device("meta"):
        theirs = tiny(**expected)
    names = authors_names(theirs, "backbone." if theirs.tasks else "")
    tensors = {name: theirs.state_dict()[ours] for name, ours in names.items()}
    found = reference_arguments(tensors, size)
    assert found == expected
    assert list(found["teacher_dims"]) == list(expected["teacher_dims"])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"layer1.weight": (3, 3)}, r"not have a stem.*layer1\.weight \(3, 3\)"),
        ({"vit.pos_embed": (1, 5, 100)}, r"not have a stem.*vit\.pos_embed \(1, 5, 100\)"),
        ({"vit.pos_embed": (5,)}, "not have a stem"),
        ({"vit.pos_embed": (1, 1009, 768)}, "1008 patches.*--size"),
    ],
)
def test_what_shapes_do_not_tell_is_said(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        reference_arguments(tensors)
