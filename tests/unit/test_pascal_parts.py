"""The parts of PASCAL-Context: files that do not fit, and the images that have any."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from teachercache.pipeline.errors import SourceError
from teachercache.student.datasets import open_dataset

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
HEIGHT, WIDTH = 20, 30
HEAD = np.ones((HEIGHT, WIDTH), np.uint8)
PERSON, DOG = 15, 12


def write_parts(root: Path, key: str, class_ind: int = PERSON, mask: object = HEAD) -> Path:
    thing = {"class_ind": class_ind, "parts": {"part_name": "head", "mask": mask}}
    file = root / f"human_parts/{key}.mat"
    savemat(file, {"anno": {"objects": thing}}, do_compression=True)
    return file


@pytest.fixture
def pascal(tmp_path: Path) -> Path:
    for folder in ("ImageSets/Context", "JPEGImages", "human_parts"):
        (tmp_path / folder).mkdir(parents=True)
    keys = {"2008_000002": PERSON, "2008_000003": DOG, "2008_000007": PERSON}
    (tmp_path / "ImageSets/Context/train.txt").write_text("\n".join(keys))
    for key, class_ind in keys.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"JPEGImages/{key}.jpg")
        write_parts(tmp_path, key, class_ind)
    return tmp_path


@pytest.mark.parametrize("mask", [HEAD[1:], HEAD.T, HEAD.repeat(2, 0), HEAD[0], 1], ids=np.shape)
def test_a_mask_that_does_not_fit_its_image_is_named(pascal: Path, mask: NDArray | int) -> None:
    write_parts(pascal, "2008_000003", mask=mask)
    with pytest.raises(SourceError, match=r"parts labels of 2008_000003(.|\n)*human_parts/2008_000003\.mat"):
        open_dataset("pascal_context", pascal).labels(1, ["parts"])


def test_damage_anywhere_in_a_file_is_named(pascal: Path) -> None:
    """Each byte in its turn: whatever the reader of MATLAB files says, it is our error or the labels."""
    file = pascal / "human_parts/2008_000002.mat"
    whole = file.read_bytes()
    dataset = open_dataset("pascal_context", pascal)
    refused = 0
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            dataset.labels(0, ["parts"])
        except SourceError as error:
            refused += "human_parts/2008_000002.mat" in str(error)
    assert refused > len(whole) // 4


def test_the_page_finds_the_images_with_parts(pascal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = re.findall(r"python > keys\.txt <<'END'\n(.*?)\nEND\n", PAGE.read_text(), re.DOTALL)
    exec(script.replace("/data/PASCALContext", str(pascal)), {})
    assert capsys.readouterr().out.split() == ["2008_000002", "2008_000007"]
