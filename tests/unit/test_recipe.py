"""A recipe that cannot be meant ends with a message that names the key and the nearest known one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachercache.cache_builder.build_recipe import BuildRecipe, RepairRecipe
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.jobs.recipes import SHIPPED, find_recipe, verb_of
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.recipe_files import _TextLoader, check_recipe, load_overrides, load_recipe
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.student_recipe import SakRecipe
from teachercache.student.training.train_recipe import TrainRecipe

TEXT = "cache: c\nsource: images\nteachers: [dinov2_small]\nviews: {num_views: 2}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_overrides_reach_into_the_recipe(recipe: Path) -> None:
    loaded = load_recipe(
        BuildRecipe,
        recipe,
        ["views.num_views=4", "teachers=[sam_base,clip]", "source.path=/x", "runner.kind=ray"],
    )
    assert loaded.views.num_views == 4
    assert list(loaded.teachers) == ["sam_base", "clip"]
    assert (loaded.source.path, loaded.source.kind, loaded.runner.kind) == ("/x", "auto", "ray")


def test_null_removes_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "cache: c\nsource: images\nteachers: {a: {model: vit_tiny_patch16_224}, b: {preset: sam_base}}\n"
    )
    assert list(load_recipe(BuildRecipe, path, ["teachers.a=null"]).teachers) == ["b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("view.num_views=2", r"view: unknown key; did you mean views\?"),
        ("views.num_view=2", r"views.num_view: unknown key; did you mean num_views\?"),
        ("runner.batchsize=2", r"runner.batchsize: unknown key; did you mean batch_size\?"),
        ("teachers.x.codecs=f16", r"teachers.x.codecs: unknown key; did you mean codec\?"),
        ("views.num_views=many", "views.num_views: .*integer.*'many'"),
        ("views.num_views=0", "views.num_views: .*greater than or equal to 1"),
        ("runner.kind=slurm", "runner.kind: .*'local' or 'ray'"),
        ("views.policy=imagenet_eval", "one fixed view"),
        ("noequals", r"must have the form key=value(.|\n)*got: +'noequals'"),
        ("views.num_views=on", "views.num_views: .*integer.*'on'"),
        ("views.num_views=0x10", "views.num_views: .*integer.*'0x10'"),
        ("views.num_views=1e0", "views.num_views: .*integer.*'1e0'"),
        ("views.num_views=1:30", "views.num_views: .*integer.*'1:30'"),
        ("views.num_views=3 # of 4", "views.num_views: .*integer.*'3 # of 4'"),
        ("views.num_views=[1", r"views.num_views: .*integer.*'\[1'"),
        ("source.pth=/a: b: c", r"source.pth: unknown key; did you mean path\?"),
        ("cache=", r"must have the form key=value(.|\n)*got: +'cache='(.|\n)*key=null"),
        ("cache= ", r"must have the form key=value(.|\n)*got: +'cache= '"),
        ("views.size=0", "views: size must be two positive numbers"),
        ("views.scale=[0.5,0.1]", "low <= high"),
    ],
)
def test_what_cannot_be_meant_is_named(recipe: Path, override: str, message: str) -> None:
    overrides = ["teachers={x: {model: vit_tiny_patch16_224}}", override]
    with pytest.raises(RecipeError, match=message):
        load_recipe(BuildRecipe, recipe, overrides)


ODD_TEXT = [
    *(
        "/w/a: b",
        "~",
        "~/x",
        "1e3",
        "0x10",
        "010",
        "1:30",
        "on",
        "no",
        "2024-01-01",
        "[a,b]",
        "{x}",
        "a #b",
        "a,b",
    ),
    *("a=b", "=", " a", "a ", "'q'", '"q"', "@x", "%x", "&a b", "*a", "!x y", "- a", "?", "|", "???", "a\\"),
    *("${cache}", r"\${x}", r"\\${x} \ \\", "${oc.env:HOME}", "a: b: c", "a\tb"),
]


@pytest.mark.parametrize("text", [*ODD_TEXT, "null"])
def test_text_is_taken_as_it_is_typed(recipe: Path, text: str) -> None:
    keys = ["cache", "source.path", "teachers.dinov2_small.codec", "runner.device"]
    loaded = load_recipe(BuildRecipe, recipe, [f"{key}={text}" for key in keys])
    found = loaded.cache, loaded.source.path, loaded.teachers["dinov2_small"].codec, loaded.runner.device
    assert found == (text,) * 4


@pytest.mark.parametrize("text", ODD_TEXT)
def test_optional_text_is_taken_as_it_is_typed(text: str) -> None:
    overrides = [f"{key}={text}" for key in ("cache", "output", "images", "student.init_from")]
    loaded = find_recipe(TrainRecipe, "sak_stage1_base", overrides)
    assert (loaded.cache, loaded.images) == (text,) * 2
    assert (loaded.output, loaded.student.init_from) == (os.path.expanduser(text),) * 2  # noqa: PTH111


@pytest.mark.parametrize("text", [text for text in ODD_TEXT if text[0] not in "{[" and text != "~"])
def test_a_source_may_be_its_path_alone(recipe: Path, text: str) -> None:
    assert load_recipe(BuildRecipe, recipe, [f"source={text}"]).source.path == text


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1).filter(str.strip))
def test_any_text_is_taken_as_it_is_typed(text: str) -> None:
    overrides = [f"cache={text}", "source.path=/x"]
    assert find_recipe(BuildRecipe, "demo", overrides).cache == text
    moved = load_overrides(RepairRecipe, [f"teachers.x.checkpoint=/{text}"], "test")
    assert moved.checkpoints == {"x": f"/{text}"}


def test_null_unsets_what_may_be_unset() -> None:
    overrides = ["cache=/c", "output=/o", "images=/i", "student.init_from=/s", "teachers=[a]"]
    unset = [f"{key}=null" for key in ("images", "student.init_from", "teachers", "distillation.cosine")]
    loaded = find_recipe(TrainRecipe, "sak_stage1_base", [*overrides, *unset])
    assert (loaded.images, loaded.student.init_from, loaded.teachers) == (None, None, None)
    assert loaded.distillation.cosine is None
    with pytest.raises(RecipeError, match="one of epochs and max_steps is needed"):
        find_recipe(TrainRecipe, "sak_stage1_base", [*overrides, "schedule.epochs=null"])


def test_lists_and_mappings_of_text_are_written_in_brackets(recipe: Path) -> None:
    overrides = ["teachers={on: {preset: no, pretrained: no}, b: {model: 1e3}}", "source={path: 0x10}"]
    loaded = load_recipe(BuildRecipe, recipe, overrides)
    assert loaded.source.path == "0x10"
    assert (loaded.teachers["on"].preset, loaded.teachers["on"].pretrained) == ("no", False)
    assert loaded.teachers["b"].model == "1e3"
    overrides = ["cache=/c", "output=/o", "teachers=[on,1e3]", 'student.freeze=[stem, "a, b"]']
    loaded_run = find_recipe(TrainRecipe, "sak_stage1_base", [*overrides, "mixed_precision=no"])
    assert loaded_run.teachers == ("on", "1e3")
    assert (loaded_run.student.freeze, loaded_run.mixed_precision) == (("stem", "a, b"), "no")


def test_plain_text_of_a_file_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "cache: 1e3\nsource: {path: 2024-01-01}\n"
        "teachers: {on: &on {model: 0x10, checkpoint: ~}, c: {<<: *on, codec: off}}\n"
        "runner: {device: 1:30, compile: on}\n"
    )
    loaded = load_recipe(BuildRecipe, path)
    assert (loaded.cache, loaded.source.path, loaded.runner.device) == ("1e3", "2024-01-01", "1:30")
    assert loaded.runner.compile is True
    assert {(name, one.model, one.codec) for name, one in loaded.teachers.items()} == {
        ("on", "0x10", "f16"),
        ("c", "0x10", "off"),
    }
    assert loaded.teachers["on"].checkpoint is None
    path.write_text("cache: 0x10\nsource: no\nteachers: [on, 1e3]\n")
    loaded = load_recipe(BuildRecipe, path)
    assert (loaded.cache, loaded.source.path, list(loaded.teachers)) == ("0x10", "no", ["on", "1e3"])


def test_a_file_still_reads_its_own_keys_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: ${oc.env:SCRATCH}/c\nsource: ${cache}/images\nteachers: [a]\n")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert load_recipe(BuildRecipe, path).source.path == "/scratch/c/images"
    assert load_recipe(BuildRecipe, path, ["cache=/x"]).source.path == "/x/images"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cache: /w/a: b", r"mapping values are not allowed here, line 1(.|\n)*quote text"),
        ("cache: [a]", r'cache: .*string.*read otherwise, cache: "…" \(got \[\'a\'\]\)'),
        ("cache: null", 'cache: .*string.*read otherwise, cache: "…"'),
        ("cache: c\nplan: &x {x: *x}", "recursion"),
        ("cache: c\n? [a]\n: b", "cannot be read"),
        ("cache: c\ncache: d", "found duplicate key cache, line 2"),
        ("cache: c\nrunner: {batch_size: yes}", "runner.batch_size: .*integer.*'yes'"),
        ("cache: c\nrunner: {batch_size: 1e3}", "runner.batch_size: .*in digits, as 1000.*'1e3'"),
        ("cache: c\nrunner: {stall_timeout_s: .inf}", "infinity is written inf"),
    ],
)
def test_what_a_file_cannot_mean_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{line}\nsource: s\nteachers: [a]\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(BuildRecipe, path)


@pytest.mark.parametrize("text", ["true", "3.5", "[a]", '"seed: 3"'])
def test_a_file_without_keys_is_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="valid dictionary"):
        load_recipe(BuildRecipe, tmp_path / "recipe.yaml")


def test_a_merged_mapping_may_replace_what_it_merges() -> None:
    text = "a: &a {seed: 1}\nx: {y: {z: &b {<<: *a, seed: 2}}}\nw: {<<: *b}\n"
    assert _TextLoader(text).get_single_data()["w"] == {"seed": "2"}


def test_a_number_is_what_it_says(recipe: Path) -> None:
    overrides = ["views.seed=010", "views.num_views=1.0", "calibration_rows=1_000", "budget=6TB"]
    loaded = load_recipe(BuildRecipe, recipe, [*overrides, "runner.compile=yes", "views.size=[64,0064]"])
    assert (loaded.views.seed, loaded.views.num_views, loaded.calibration_rows) == (10, 1, 1000)
    assert (loaded.budget, loaded.runner.compile, loaded.views.size) == (6 * 10**12, True, (64, 64))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: c\n")
    with pytest.raises(RecipeError, match="source: this required key is missing"):
        load_recipe(BuildRecipe, path)


def test_broken_yaml_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("cache: [1, 2\nsource: x")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(BuildRecipe, path)


def test_an_unknown_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match="did you mean imagenet1k_vitl"):
        find_recipe(BuildRecipe, "imagenet1k_vit_l")


def test_the_data_plane_knows_no_shipped_recipe_by_itself() -> None:
    with pytest.raises(RecipeError, match="check the path"):
        load_recipe(BuildRecipe, "demo")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    models: dict[str | None, Any] = {
        "build": BuildRecipe,
        "train": TrainRecipe,
        "train-decoders": DecoderRecipe,
    }
    find_recipe(models[verb_of(path)], path.stem)
    header, *_ = re.split(r"^\w+:", text, flags=re.MULTILINE)
    for word in ("Command", "Hardware", "Metric"):
        assert word in header, f"the header does not state: {word}"


def test_stage_2_of_the_page_starts_from_a_student_with_the_same_paths() -> None:
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    commands = [command.split() for command in re.findall(r"`(sak_stage\d_\w+ …[^`{]*)`", page)]
    recipes = [
        find_recipe(TrainRecipe, name, [text.rstrip(",") for text in rest]) for name, _, *rest in commands
    ]
    of_sak = [(r, r.student) for r in recipes if isinstance(r.student, SakRecipe)]
    paths = {f"{r.output}/student": student.adapter_paths for r, student in of_sak if r.multitask is None}
    starts = [student for r, student in of_sak if r.multitask and student.init_from]
    assert False in [student.adapter_paths for student in starts]
    assert [s.init_from for s in starts if s.adapter_paths != paths[str(s.init_from)]] == []


def test_a_listed_timm_model_is_named_without_its_tag() -> None:
    def teachers(value: object) -> dict[str, TeacherRecipe]:
        content = {"source": "/x", "cache": "/y", "teachers": value}
        return check_recipe(BuildRecipe, content, "of this test").teachers

    named = teachers(["dinov2_small", "test_vit.r160_in1k"])
    assert list(named) == ["dinov2_small", "test_vit"]
    assert named["test_vit"].model == "test_vit.r160_in1k"
    with pytest.raises(RecipeError, match="two of these have the same name"):
        teachers(["test_vit.a", "test_vit.b"])
    with pytest.raises(RecipeError, match=r"its model may have any name: \{name: \{model: a\.b\}\}"):
        teachers({"a.b": {"model": "test_vit"}})


def test_a_key_of_a_listed_teacher_can_be_overridden() -> None:
    overrides = ["teachers=[dinov2_small]", "teachers.dinov2_small.pretrained=false"]
    recipe = find_recipe(BuildRecipe, "demo", ["source.path=/x", "cache=/y", *overrides])
    assert recipe.teachers["dinov2_small"].pretrained is False


def test_a_student_may_lie_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    said = ["cache=c", "output=~/runs/a", "student.init_from=~/runs/b/student"]
    recipe = find_recipe(TrainRecipe, "sak_stage2_pascal_base", said)
    assert (recipe.output, recipe.student.init_from) == ("/home/me/runs/a", "/home/me/runs/b/student")
    hub = find_recipe(TrainRecipe, "sak_stage2_pascal_base", [*said[:2], "student.init_from=me/student"])
    assert hub.student.init_from == "me/student"
    decoders = find_recipe(
        DecoderRecipe, "kpu_decoders_frozen", ["output=~/runs/d", "student=~/runs/b/student"]
    )
    assert (decoders.output, decoders.student) == ("/home/me/runs/d", "/home/me/runs/b/student")


def test_a_step_takes_as_many_images_on_any_number_of_processes() -> None:
    recipe = find_recipe(TrainRecipe, "sak_stage1_small")
    for processes, steps in ((8, 1), (4, 2), (1, 8)):
        there = recipe.on(processes)
        assert there.gradient_accumulation_steps == steps
        assert there.images_per_step(processes) == 128
    for processes, overrides, expected in (
        (3, [], "global_batch_size=null"),  # no batch size divides 128 among three
        (8, ["batch_size_per_process=12"], "batch_size_per_process=8"),
        (8, ["gradient_accumulation_steps=2"], "left out"),
        (1, ["batch_size_per_process=256"], "batch_size_per_process=128"),
    ):
        with pytest.raises(RecipeError, match=rf"(?s)step of 128 images.*{expected}"):
            find_recipe(TrainRecipe, "sak_stage1_small", overrides).on(processes)
    assert find_recipe(TrainRecipe, "demo_student").on(3).images_per_step(3) == 24
