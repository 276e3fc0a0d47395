"""Finished students: made smaller, to the Hub, and out of the checkpoints of SAK's authors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.pipeline.errors import CheckpointError, LicenceError, RecipeError
from teachercache.pipeline.sharing.licences import card_header
from teachercache.student import hub
from teachercache.student.build import build_student, load_student
from teachercache.student.hub import push_to_hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    build_student("sak", stem="test_vit", teacher_dims={"a": 64}, image_size=(32, 32)).save_pretrained(folder)
    return folder


def invoke(*arguments: object, status: int = 0) -> list[str]:
    """The lines that the command prints."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output.splitlines()


def test_a_teacher_is_removed_and_the_others_stay_to_the_bit(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "smaller"
    build_student(
        "sak", stem="test_vit", teacher_dims={"a": 64, "b": 48, "c": 64}, image_size=(32, 32)
    ).save_pretrained(whole)
    before, pixels_B3HW = load_student(whole), torch.randn(2, 3, 32, 32)
    (told,) = invoke("remove-teacher", whole, "a", "b", "-o", output)
    after = load_student(output)
    counts = [sum(p.numel() for p in student.parameters()) for student in (before, after)]
    assert told == f"{output}: teachers: c; {counts[0]:,} → {counts[1]:,} parameters"
    assert all(map(torch.equal, after(pixels_B3HW)["c"], before(pixels_B3HW)["c"]))
    assert not (output / "README.md").exists()
    with pytest.raises(RecipeError, match="needs a teacher"):
        CliRunner().invoke(app, ["remove-teacher", str(output), "c", "-o", "x"], catch_exceptions=False)


def test_a_student_keeps_the_licence_of_a_teacher_that_was_removed(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "smaller"
    teachers = {"dinov3": 64, "b": 64}
    build_student("sak", stem="test_vit", teacher_dims=teachers, image_size=(32, 32)).save_pretrained(whole)
    header = card_header({"dinov3": "dinov3-license", "b": "mit"})
    (whole / "README.md").write_text(f"---\n{header}---\n# A student\n")
    invoke("remove-teacher", whole, "dinov3", "-o", output)
    assert (output / "README.md").read_text().endswith("# A student\n\nRemoved since: dinov3.\n")
    with pytest.raises(LicenceError, match="dinov3 is under dinov3-license"):
        push_to_hub(output, "me/sak")


def test_a_student_without_a_card_is_public_only_when_told(saved: Path) -> None:
    with pytest.raises(LicenceError, match=r"(?s)a is under not stated.*--accept-licences"):
        push_to_hub(saved, "me/sak")


def test_push_prints_the_address(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub cannot be reached here, so its client notes what it is asked for."""
    asked: list[dict[str, Any]] = []

    class Noting(HfApi):
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked.append({"repo_id": repo_id, **options})

        def upload_folder(self, **options: Any) -> Any:
            asked.append(options)
            return SimpleNamespace(repo_url=f"https://huggingface.co/{options['repo_id']}")

    monkeypatch.setattr(hub, "HfApi", Noting)
    assert invoke("push", saved, "me/sak", "--private") == ["https://huggingface.co/me/sak"]
    assert asked[0] == {"repo_id": "me/sak", "private": True, "exist_ok": True}
    assert asked[1]["folder_path"] == saved
    invoke("push", saved, "me/sak", "--accept-licences")
    assert asked[2]["private"] is False


@pytest.mark.parametrize("repository", ["me/sak", "no such/name/at all"])
def test_a_hub_that_does_not_take_it_is_told_of(
    repository: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="none"))
    with pytest.raises(CheckpointError, match=f"(?s)not pushed to {repository}.*hf auth login"):
        push_to_hub(saved, repository, private=True)


def test_a_student_without_weights_is_not_pushed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("the Hub is not asked"))
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        push_to_hub(tmp_path, "me/sak")


def test_a_student_is_public_only_where_the_licences_in_its_card_let_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="none"))
    shutil.copytree(saved, tmp_path / "student")
    header = card_header({"a": "mit", "dinov3": "dinov3-license"})
    (tmp_path / "student" / "README.md").write_text(f"---\n{header}---\n# A student\n")
    with pytest.raises(LicenceError, match="dinov3 is under dinov3-license"):
        push_to_hub(tmp_path / "student", "me/sak")
    for rights in ({"private": True}, {"accept_licences": True}):
        with pytest.raises(CheckpointError, match="not pushed to me/sak"):
            push_to_hub(tmp_path / "student", "me/sak", **rights)


def test_to_share_a_student_takes_neither_cache_nor_ray_nor_teachers() -> None:
    code = (
        "import sys; from teachercache.student.build import load_student;"
        "from teachercache.student.hub import push_to_hub;"
        "heavy = {'ray', 'zarr', 'accelerate', 'teachercache.pipeline.cache', "
        "'teachercache.cache_builder'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_checkpoint_of_the_authors_becomes_a_student(tmp_path: Path) -> None:
    student = build_student(
        "sak", stem="vit_small_patch16_384", teacher_dims={"sam": 384}, image_size=(32, 64), sak_compat=True
    ).eval()
    theirs = {
        name.replace("stem.vit.", "vit.").replace("paths.sam.adapters.", "tsap.sam."): tensor
        for name, tensor in student.state_dict().items()
        if name not in ("mean", "std")
    }
    for level, block in enumerate((2, 5, 8, 11)):
        for rest in ("weight", "bias"):
            theirs[f"out_norms.{block}_sam.{rest}"] = theirs.pop(f"paths.sam.output_norms.{level}.{rest}")
    checkpoint, output = tmp_path / "checkpoint.pth", tmp_path / "student"
    torch.save({"model": theirs, "epoch": 29}, checkpoint)

    command = ("import-reference", checkpoint, "-o", output, "--size", 32, 64)
    (told,) = invoke(*command)
    assert told == (
        f"{output}: vit_small_patch16_384, teachers: sam, tasks: none; no tensors keep random values"
    )
    loaded = load_student(output)
    assert loaded.config == student.config
    assert torch.equal(
        loaded.state_dict()["paths.sam.output_norms.3.weight"], theirs["out_norms.11_sam.weight"]
    )
    pixels_B3HW = torch.randn(1, 3, 32, 64)
    assert all(map(torch.equal, loaded(pixels_B3HW)["sam"], student(pixels_B3HW)["sam"]))

    theirs["vit.head.bias"] = theirs["vit.cls_token"] = torch.zeros(7)
    del theirs["tsap.sam.3.scale"]
    torch.save({"model": theirs}, checkpoint)
    *named, told = invoke(*command, status=1)
    assert set(named) == {
        "unexpected: vit.head.bias: none in the student, (7,) in the checkpoint",
        "other shape: stem.vit.cls_token: (1, 1, 384) in the student, (7,) in the checkpoint",
        "missing: paths.sam.adapters.3.scale: (1,) in the student, none in the checkpoint",
    }
    assert told.endswith("2 tensors keep random values")
