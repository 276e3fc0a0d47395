"""Decoders under torchrun: two real processes (gloo) against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teachercache.pipeline.recipe_files import load_recipe
from teachercache.student.build import build_student
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.train_decoders import train_decoders
from tests.train_recipes import logged

RECIPE = """
learns: true
image_size: [32, 32]
decoders: {kind: {kind: linear, dataset: {kind: scenes, root: ROOT}, batch_size_per_process: BATCH}}
schedule: {max_steps: 4}
mixed_precision: "no"
loader: {threads: 1}
trackers: []
student: STUDENT
output: OUTPUT
"""


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_train_decoders_as_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=6, val=0, size=(32, 32))
    torch.manual_seed(0)
    student = build_student("sak", stem="test_vit", teacher_dims={"clip": 8}, image_size=(32, 32))
    student.save_pretrained(tmp_path / "student")

    def stated(name: str, batch: int) -> Path:
        text = RECIPE.replace("ROOT", str(tmp_path / "scenes")).replace("BATCH", str(batch))
        text = text.replace("STUDENT", str(tmp_path / "student")).replace("OUTPUT", str(tmp_path / name))
        (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{name}.yaml"

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    verb = ["-m", "teachercache.jobs.cli", "train-decoders", str(stated("two", 2))]
    subprocess.run([*launch, *verb], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    train_decoders(load_recipe(DecoderRecipe, stated("one", 4)))
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
