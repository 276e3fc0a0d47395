"""Every example runs on a tiny cache, and its loss falls."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.make_cache import make_cache, make_images, teacher_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS: dict[str, dict[str, Any]] = {
    "detector_neck": {"backbone": "test_resnet"},
    "lightning_module": {"backbone": "test_resnet", "workers": 0},
    "plain_pytorch": {"workers": 0},
    "timm_train": {"model_name": "test_resnet", "workers": 0},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("examples")
    teachers = {"alpha": teacher_spec(), "beta": teacher_spec(width=4, grid=3, codec="f16")}
    return make_cache(folder / "c", make_images(folder / "images", 6), teachers=teachers).storage.url


def test_each_is_short_and_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == OPTIONS.keys()
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.glob("*.py"))


@pytest.mark.filterwarnings("ignore")  # what other trainers warn of
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_its_loss_falls(name: str, cache: str) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="the package lightning is not installed")
    spec = spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    losses = example.main(cache, epochs=6, batch_size=6, **OPTIONS[name])
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05
