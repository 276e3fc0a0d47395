"""The benchmark of GPUs takes its whole path here, and goes on where a section fails or is late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GOALS, SMOKE, Figures, Run, run_sections, verdict

ROOT = Path(__file__).parents[2]
HIDDEN = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "webdataset", "omegaconf"):
            raise ModuleNotFoundError(f"{name} is not on this machine")

sys.meta_path.insert(0, Absent())
from benchmarks.gpu import main
main()
"""


def test_every_section_works_without_ray_webdataset_and_omegaconf(tmp_path: Path) -> None:
    output = tmp_path / "gpu.jsonl"
    sections = [name for name in gpu.SECTIONS if name != "tests"]  # they are in the suite
    command = [sys.executable, "-c", HIDDEN, "--smoke", "--output", str(output), "--sections", *sections]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiled for a CPU it tests no GPU
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert not [record for record in records if "problem" in record]
    assert [name for name in sections if name in {record["section"] for record in records}] == sections
    assert "no figure means anything" in done.stdout
    assert "short" not in done.stdout


def test_the_tests_of_a_gpu_begin_without_pytest_timeout() -> None:
    command = [*gpu.PYTEST, "-p", "no:timeout", "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_section_that_fails_or_is_late_leaves_the_next_one_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(run: Run) -> Figures:
        yield "before", 1.0
        raise RuntimeError("CUDA error: out of memory\nand many lines")

    def slow(run: Run) -> Figures:
        yield "begun", 2.0
        time.sleep(60)

    def last(run: Run) -> Figures:
        yield "last", 3.0

    monkeypatch.setattr(gpu, "SECTIONS", {"failing": (failing, 9), "slow": (slow, 1.5), "last": (last, 9)})
    records: list[dict[str, Any]] = []
    run = Run(torch.device("cpu"), SMOKE, tmp_path)
    run_sections(run, ["failing", "slow", "last"], 30, records.append)
    assert run.figures == {"before": 1.0, "begun": 2.0, "last": 3.0}
    problems = {record["section"]: record["problem"] for record in records if "problem" in record}
    assert problems["failing"] == "RuntimeError: CUDA error: out of memory"
    assert problems["slow"].startswith("late: more than")
    records.clear()
    run_sections(run, ["last"], 0.5, records.append)
    assert records == [{"section": "last", "problem": "left out: no time"}]


def test_goals_are_met_fallen_short_of_or_not_measured() -> None:
    title = "build three adjoint, f16, over bare"
    assert GOALS[title] == ("<=", 1.05)
    assert verdict({title: 1.04}, title).startswith("ok")
    assert verdict({title: 1.06}, title).startswith("short")
    assert verdict({}, title).startswith("not measured")
    assert verdict({"cpus": 2.0}, "cpus") == ""
