"""A labelled data set from its folder to a cache: checked by the command, built, joined by keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from teachercache import FeatureCache, build, build_teacher, render_view
from teachercache.jobs import cli
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.labels import render_labels
from teachercache.student.datasets.scenes import write_scenes
from tests.make_cache import build_recipe

SIZE = (32, 48)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", train=4, val=2, size=(40, 40), seed=1)
    return tmp_path / "scenes"


def datasets(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner().invoke(cli.app, ["datasets", *map(str, arguments)])


def test_the_command_names_what_a_folder_lacks(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = datasets(monkeypatch, "scenes", scenes)
    assert complete.exit_code == 0, complete.output
    (scenes / "labels/train/000002.safetensors").unlink()
    (scenes / "val.txt").unlink()
    lacking = datasets(monkeypatch, "scenes", scenes)
    assert lacking.exit_code == 1
    lines = {" ".join(line.split()[:2]): line.split() for line in lacking.output.splitlines() if line.split()}
    assert lines["train labels"][-3:] == ["3", "4", "labels/train/000002.safetensors"]
    assert lines["val val.txt"][-3:] == ["0", "1", "val.txt"]
    nothing = datasets(monkeypatch, "pascal_context", scenes)
    assert nothing.exit_code == 1
    assert "4,998" in nothing.output


def test_a_cache_of_multitask_views_joins_the_labels(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = datasets(monkeypatch, "scenes", scenes, "--link", scenes.parent / "links")
    source = scenes.parent / "links" / "train"
    assert f"source.path={source}" in linked.output
    views = {"policy": "multitask_train", "num_views": 3, "size": SIZE}
    recipe = build_recipe(scenes.parent / "cache", source, views=views)
    build(recipe, Console(quiet=True))

    cache, dataset = FeatureCache.open(scenes.parent / "cache"), open_dataset("scenes", scenes)
    assert [cache.key(sample) for sample in range(cache.num_samples)] == dataset.keys
    rows = list(range(12))
    assert len({cache.view(row).flip for row in rows}) == 2
    assert any(cache.view(row).box[0] < 0 for row in rows)
    renders = []
    for row in rows:
        image, view = dataset.image(row // 3), cache.view(row)
        renders.append(render_view(image, view))
        assert torch.equal(renders[-1], render_view(cache.image(row // 3), view))
        labels = render_labels(dataset.labels(row // 3), view)
        assert labels.keys() == dataset.tasks.keys()
        assert all(tensor.shape[-2:] == SIZE for tensor in labels.values())
    live = build_teacher(cache.spec.teachers["tiny"])(torch.stack(renders)).feature_maps_BSHWC
    torch.testing.assert_close(cache.read(rows)["tiny"].decode(), live, rtol=1e-4, atol=1e-4)

    assert {cache.view(row).photometric for row in rows} == {"distortion"}
    older = build_recipe(scenes.parent / "cache", source, views=views | {"photometric": "color_jitter"})
    message = "views.photometric: the cache has 'distortion', the recipe asks for 'color_jitter'"
    with pytest.raises(CacheMismatchError, match=message):
        build(older, Console(quiet=True))
