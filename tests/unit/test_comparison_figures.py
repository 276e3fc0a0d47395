"""Figures 1, 3 and 5 of the paper: the numbers that they show, and one's own scores in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.pipeline.errors import RecipeError
from teachercache.student.measuring.figures import (
    Scores,
    comparison,
    comparison_figure,
    read_own,
)

MINE = {"semseg": 80.25, "parts": 70.54, "saliency": 84.54, "normals": 13.57, "boundary": 2 * 74.22}


def test_figure_1_is_the_gains_of_frozen_models() -> None:
    """Over 30% in human parsing for DINOv2, over 5% for CLIP, a 30% drop in segmentation for SAM (2.1)."""
    (panel,) = comparison(1)
    gains = {name.split("\n")[0]: values for name, values in panel.models.items()}
    assert list(gains) == ["DINOv2", "CLIP", "SAM", "SAK"]
    assert gains["DINOv2"]["parts"] == pytest.approx(32.63, abs=0.01)
    assert min(gains["CLIP"][task] for task in ("semseg", "parts", "boundary")) > 5
    assert gains["SAM"]["semseg"] == pytest.approx(-31.18, abs=0.01)
    ratios = [float(name.split()[-1]) for name in panel.models]
    assert ratios == [0.99, 1.17, 0.0, 1.72], "CLIP is more balanced than DINOv2, SAM neither, SAK the most"


def test_figure_3_is_the_gains_of_tables_13_and_14() -> None:
    pascal, nyud = comparison(3)
    assert list(nyud.models) == [
        "Multi-task baseline\nΔm -1.72",
        "RADIO\nΔm 6.33",
        "Theia\nΔm 1.83",
        "SAK of ViT-L teachers\nΔm 11.11",
    ]
    assert "SAK of ViT-L teachers\nΔm 0.83" in pascal.models


def test_figure_5_is_the_gains_of_table_18() -> None:
    (panel,) = comparison(5, [Scores("mine, 50% of the data", "pascal_context", MINE)])
    rounded = {model: [round(gain, 2) for gain in gains.values()] for model, gains in panel.models.items()}
    assert rounded == {
        "Multi-task baseline": [-10.32, -7.42, -6.0, -4.04],
        "RADIO": [-7.43, -4.7, -3.42, -1.53],
        "Theia": [-9.2, -6.7, -5.88, -4.33],
        "SAK": [-4.02, -1.95, -1.16, -0.03],
        "mine": [20.0],
    }


def test_what_no_figure_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"1 \(its left half\), 3 or 5"):
        comparison(7)
    with pytest.raises(RecipeError, match="no place for these scores"):
        comparison(1, [Scores("mine", "nyud", MINE)])
    with pytest.raises(RecipeError, match="25% of the data"):
        comparison(5, [Scores("mine", "pascal_context", MINE)])
    with pytest.raises(RecipeError, match="no score of parts"):
        comparison(3, [Scores("mine", "pascal_context", {k: v for k, v in MINE.items() if k != "parts"})])
    (tmp_path / "scores.json").write_text("[]")
    for named in ("mine", f"mine={tmp_path / 'none.json'}", f"mine={tmp_path / 'scores.json'}"):
        with pytest.raises(RecipeError, match="NAME=FILE"):
            read_own(named)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_one_s_own_scores_are_drawn(number: int, tmp_path: Path) -> None:
    file, picture = tmp_path / "scores.json", tmp_path / "figure.png"
    file.write_text(json.dumps({"dataset": "pascal_context", "scores": MINE}))
    name = "mine, 25% of the data" if number == 5 else "mine"
    done = CliRunner().invoke(app, ["figure", str(number), f"{name}={file}", "-o", str(picture)])
    assert done.exit_code == 0, done.output
    with Image.open(picture) as drawn:
        assert drawn.width > 500
    scores = read_own(f"{name}={file}")
    legend = comparison_figure(number, [scores]).axes[0].get_legend()
    assert legend is not None
    assert any(text.get_text().startswith("mine") for text in legend.get_texts())
