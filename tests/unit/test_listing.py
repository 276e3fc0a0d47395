"""The verbs that say what there is to choose from."""

from __future__ import annotations

import re
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.teachers.registry import presets
from teachercache.jobs.cli import VERBS, app
from teachercache.jobs.cli.listing import _rooms
from teachercache.jobs.recipes import SHIPPED, find_recipe, verb_of
from teachercache.pipeline.codecs import codec_names
from teachercache.pipeline.errors import RecipeError
from teachercache.student.datasets import DATASETS, DatasetKind
from teachercache.student.decoders import DECODERS, DecoderKind
from teachercache.student.models.heads import HEADS, HeadKind
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.targets import TARGET_SOURCES, FeaturesFrom
from teachercache.student.training.train_recipe import TrainRecipe


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_version_is_that_of_the_package() -> None:
    assert printed("--version") == f"teachercache {version('teachercache')}\n"


def test_help_groups_every_verb_by_its_use() -> None:
    text = printed("--help")
    assert all(f" {use} " in text for use in VERBS)
    assert all(f" {verb.__name__.replace('_', '-')} " in text for verbs in VERBS.values() for verb in verbs)


def test_every_shipped_recipe_is_listed_for_its_verb() -> None:
    rows = [line.split("│") for line in printed("recipes").splitlines() if line.count("│") == 4]
    listed = {name.strip(): verb.strip() for _, name, verb, *_ in rows if name.strip()}
    assert set(listed) == {file.stem for file in SHIPPED.glob("*.yaml")}
    for name, verb in listed.items():
        models: dict[str, Any] = {"build": BuildRecipe, "train": TrainRecipe, "train-decoders": DecoderRecipe}
        find_recipe(models[verb], name)
        assert (SHIPPED / f"{name}.yaml").read_text().splitlines()[0].endswith("."), "what is listed is whole"


def test_what_a_key_can_name_is_what_there_is() -> None:
    kinds = {DatasetKind: DATASETS, DecoderKind: DECODERS, HeadKind: HEADS, FeaturesFrom: TARGET_SOURCES}
    for kind, known in kinds.items():
        assert get_args(kind) == tuple(known)


def test_every_preset_and_codec_is_listed() -> None:
    assert all(name in printed("presets") for name in presets())
    rows = {line.split()[1]: line.split() for line in printed("codecs").splitlines() if line.startswith("│")}
    assert set(rows) == set(codec_names())
    assert rows["f16"][5] == "16.00"


RECIPES: dict[str, tuple[type[BaseModel], str, str]] = {
    "build": (BuildRecipe, "teachers.NAME.codec", "str = f16"),
    "train": (TrainRecipe, "multitask.dataset.fraction", "float = 1.0"),
    "train-decoders": (DecoderRecipe, "decoders", "NAME: keys below, must be given"),
}


@pytest.mark.parametrize(("kind", "model", "key", "says"), [(kind, *row) for kind, row in RECIPES.items()])
def test_every_key_of_a_recipe_is_listed_with_its_default_and_a_sentence(
    kind: str, model: type[BaseModel], key: str, says: str
) -> None:
    lines = [line for line in printed("help-keys", kind).splitlines() if line.strip()]
    rows = {one.split("  ")[0]: (one, below) for one, below in pairwise(lines) if "  " in one}
    assert set(model.model_fields) <= set(rows)
    assert rows[key][0] == f"{key}  {says}"
    for path, room in _rooms(model):
        for name in room.model_fields:
            sentence = rows[f"{path}.{name}" if path else name][1]
            assert re.match(r" {4}\S", sentence), f"{kind} says nothing of {path}.{name}"


def test_a_part_of_the_keys_can_be_asked_for() -> None:
    text = printed("help-keys", "build", "runner")
    assert "runner.batch_size" in text
    assert "rows_per_shard" not in text
    assert printed("help-keys", "build", "runner.device").startswith("runner.device  str = auto\n    ")
    result = CliRunner().invoke(app, ["help-keys", "build", "runer"])
    assert isinstance(result.exception, RecipeError)
    assert "teachers.NAME" in str(result.exception)


def test_a_recipe_for_another_verb_is_refused_in_one_error() -> None:
    with pytest.raises(RecipeError, match=r"(?s)not a recipe for build.*teachercache train sak_stage1_small"):
        find_recipe(BuildRecipe, "sak_stage1_small")
    with pytest.raises(RecipeError, match=r"(?s)not a recipe for train.*teachercache build demo"):
        find_recipe(TrainRecipe, "demo")


def test_a_recipe_with_misspelt_keys_is_of_no_verb(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("teecher: x\n")
    assert verb_of(file) is None
