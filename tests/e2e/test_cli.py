"""The `teachercache` command, as a person uses it: exit statuses and messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.worker import Worker
from teachercache.jobs import cli
from teachercache.pipeline.errors import BuildError
from tests.make_cache import build_recipe, make_cache, make_images

ROOT = Path(__file__).parents[2]
VERBS = (
    "plan build calibrate verify repair inspect report view merge subset convert train evaluate repsim "
    "probe depth-probe figure remove-teacher push import-reference norms datasets "
    "zeroshot recipes presets codecs help-keys"
)
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def teachercache(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process; returns its exit status and what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["teachercache", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        status = ended.value.code or 0
        assert isinstance(status, int)
        return status, printed.out + printed.err

    return call


def script(name: str, *arguments: object, folder: Path) -> tuple[int, str]:
    """Run a script of jobs/ in a process of its own."""
    command = [sys.executable, str(ROOT / "jobs" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture
def recipe(tmp_path: Path, images: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(build_recipe(tmp_path / "cache", images).model_dump_json())
    return path


def test_help_names_every_verb(teachercache: Command) -> None:
    status, text = teachercache("--help")
    assert status == 0
    assert all(verb in text for verb in VERBS.split())


def test_build_verify_inspect(teachercache: Command, recipe: Path, tmp_path: Path) -> None:
    status, text = teachercache("plan", recipe)
    assert status == 0
    assert "8 in 2 shards of 6" in text
    assert not (tmp_path / "cache").exists()
    status, text = teachercache("build", recipe)
    assert status == 0
    assert "2 shards, 8 views" in text
    assert "bottleneck" in text or "The teachers wait" in text
    status, text = teachercache("verify", tmp_path / "cache", "--full")
    assert (status, "2 shards of tiny are sound (every byte)" in text) == (0, True)
    status, text = teachercache("inspect", tmp_path / "cache", "--pictures", tmp_path / "maps.png")
    assert status == 0
    assert "2 of 2" in text
    assert "Random weights" in text
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    status, text = teachercache("inspect", tmp_path / "cache", "--json")
    assert json.loads(text)["teachers"]["tiny"]["rows_committed"] == 8


def test_a_plan_within_a_budget(teachercache: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = teachercache("plan", recipe, "budget=40000")
    assert status == 0
    assert "costs nothing" in text or "exact for the flattened cosine" in text
    keys = text.split("Add to the command:")[1].replace('"', "").split()
    assert teachercache("build", recipe, "budget=40000", "--dry-run", *keys)[0] == 0

    def load(*_: object, **__: object) -> None:
        raise AssertionError("no teacher is loaded for a budget that cannot be kept")

    monkeypatch.setattr("teachercache.cache_builder.budget.build_teacher", load)
    assert "No grid and codec fits this budget." in teachercache("plan", recipe, "budget=2 kB")[1]
    for budget in ("much", "1e400TB"):
        assert "This is not a number of bytes." in teachercache("plan", recipe, f"budget={budget}")[1]


def test_damage_is_found_and_named(teachercache: Command, recipe: Path, tmp_path: Path) -> None:
    teachercache("build", recipe)
    shard = next((tmp_path / "cache").rglob("c/1/0/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    status, text = teachercache("verify", tmp_path / "cache")
    assert status == 1
    assert "teachers/tiny/codes/c/1/0/0/0/0 has" in text
    assert "teachercache repair" in text
    status, text = teachercache("repair", tmp_path / "cache", "batch_size=4")
    assert (status, "is sound" in text) == (0, True), text
    assert teachercache("verify", tmp_path / "cache", "--full")[0] == 0


@pytest.mark.parametrize(
    ("override", "status", "messages"),
    [
        ("source.path=/no/such/folder", 1, ["got:", "/no/such/folder", "do:"]),
        ("source.path=EMPTY", 1, ["no image", "got:", "expected:", "do:"]),
        ("teachers=[dinov2_smal]", 1, ["no teacher of this name", "dinov2_small"]),
        (
            "teachers={t: {model: vit_tiny_patch16_224, image_size: 50}}",
            1,
            ["50×50", "multiples of 16×16", "48"],
        ),
        ("teachers={t: {model: vit_tiny_patch16_224}}", 1, ["weights", "checkpoint", "pretrained"]),
        ("vews.num_views=3", 2, ["vews: unknown key; did you mean views?"]),
        ("views.num_views=three", 2, ["views.num_views", "integer", "three"]),
    ],
)
def test_bad_input_ends_with_a_message(
    teachercache: Command, recipe: Path, tmp_path: Path, override: str, status: int, messages: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    override = override.replace("EMPTY", str(tmp_path / "empty"))
    ended, text = teachercache("build", recipe, override)
    assert ended == status, text
    for message in messages:
        assert message in text
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_a_cache_of_another_spec_is_refused(teachercache: Command, recipe: Path) -> None:
    teachercache("build", recipe)
    status, text = teachercache("build", recipe, "views.seed=4")
    assert status == 1
    assert "views.seed: the cache has 0, the recipe asks for 4" in text


def test_caches_from_caches(teachercache: Command, tmp_path: Path, images: Path) -> None:
    cache, other = tmp_path / "cache", make_images(tmp_path / "other", 3, seed=1)
    make_cache(cache, images)
    for path in other.iterdir():
        path.rename(path.with_name(f"b_{path.name}"))
    make_cache(tmp_path / "more", other)
    (tmp_path / "keys.txt").write_text("image_001\nb_image_002\n")
    for arguments, message in (
        (["merge", cache, tmp_path / "more", "-o", tmp_path / "all"], "7 samples, 14 rows of alpha, beta"),
        (["subset", tmp_path / "all", "-o", tmp_path / "two", "--keys", tmp_path / "keys.txt"], "2 samples"),
        (["subset", cache, "-o", tmp_path / "a", "--teachers", "alpha"], "8 rows of alpha; 2 shards"),
        (["convert", tmp_path / "two", "-o", tmp_path / "tars", "--to", "webdataset"], "2 shards written"),
        (["convert", tmp_path / "two", "-o", tmp_path / "tars", "--to", "webdataset"], "0 shards written"),
        (["inspect", tmp_path / "tars", "--row", "3"], "sound"),
        (["convert", tmp_path / "tars", "-o", tmp_path / "theia", "--to", "theia"], "imagenet: 4 samples of"),
        (["convert", cache, "-o", tmp_path / "lines.parquet", "--to", "parquet"], "lines.parquet: 8 lines"),
    ):
        status, text = teachercache(*arguments)
        assert (status, message in text) == (0, True), text
        if arguments[0] not in ("inspect",) and arguments[-1] not in ("theia", "parquet"):
            assert teachercache("verify", arguments[arguments.index("-o") + 1], "--full")[0] == 0
    for arguments, message in (
        (["merge", cache, cache, "-o", tmp_path / "x"], "4 samples are in more than one of them"),
        (["subset", cache, "-o", tmp_path / "x", "--fraction", "0"], "would be empty"),
    ):
        status, text = teachercache(*arguments)
        assert (status in (1, 2), message in text, "do:" in text) == (True, True, True), text
    status, text = teachercache("convert", cache, "-o", tmp_path / "x", "--to", "tfrecord")
    assert (status, "'webdataset', 'zarr', 'theia', 'parquet', 'lance'" in text) == (2, True), text


def test_training_refuses_what_is_not_complete(teachercache: Command, tmp_path: Path, images: Path) -> None:
    make_cache(tmp_path / "cache", images, skip_shards=[1])
    status, text = teachercache(
        "train", "demo_student", f"cache={tmp_path / 'cache'}", f"output={tmp_path / 'run'}"
    )
    assert status == 1
    assert "1 of 2 shards missing" in text
    assert "run the same build command again" in text


def test_no_cache_is_one_message(teachercache: Command, tmp_path: Path) -> None:
    for verb in ("inspect", "verify"):
        status, text = teachercache(verb, tmp_path)
        assert status == 1
        assert "There is no cache here" in text


def test_a_variable_that_a_job_needs_must_be_set(teachercache: Command) -> None:
    status, text = teachercache("submit", "demo", "--env", "NOT_SET_HERE")
    assert status == 1
    assert "--env NOT_SET_HERE" in text


def test_a_ray_job_refuses_relative_paths(tmp_path: Path) -> None:
    """Ray runs a job in a copy of the working folder, which it deletes."""
    copy = tmp_path / "runtime_resources" / "working_dir_files"
    copy.mkdir(parents=True)
    status, text = script("cache_teachers.py", "--dry-run", "demo", "cache=caches/x", folder=copy)
    assert status == 2
    assert "absolute path" in text


@pytest.mark.parametrize("name", ["cache_teachers.py", "train_student.py"])
def test_scripts_explain_themselves(name: str, tmp_path: Path) -> None:
    status, text = script(name, "--help", folder=tmp_path)
    assert status == 0
    assert f"{name} [OPTIONS] {{RECIPE}}" in text
    status, text = script(name, folder=tmp_path)
    assert status == 2
    assert "Missing argument 'RECIPE'" in text


@pytest.mark.parametrize("device", ["cpuu", "cuda:77"])
def test_a_device_that_is_not_there_is_one_message(device: str) -> None:
    with pytest.raises(BuildError, match=f"runner.device={device}"):
        Worker({}, RunnerRecipe(device=device))
