"""Cluster files cannot be run here; they can be read, and must call what exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pipeline.recipe import SHIPPED

INFRA = Path(__file__).parents[2] / "infra"
ROOT = INFRA.parent
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_is_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_accelerate_reads_its_configuration() -> None:
    config = load_config_from_file(str(INFRA / "accelerate" / "one_node.yaml"))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sbatch"], ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_called_is_there(path: Path) -> None:
    text = path.read_text()
    for script in re.findall(r"\bjobs/\w+\.py|\binfra/[\w./]+\w", text):
        assert (ROOT / script).exists(), script
    for recipe in re.findall(r"\b(?:imagenet1k|sak)_\w+", text):
        assert (SHIPPED / f"{recipe}.yaml").exists(), recipe


def test_the_image_copies_every_package() -> None:
    copied = re.findall(r"^COPY (\w+) ", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) == {"pipeline", "cache_builder", "student", "jobs"}
