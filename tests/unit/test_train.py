"""The trainer in one process: exact resume, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from huggingface_hub import HfApi
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from teachercache import build
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import (
    CacheError,
    CacheNotFoundError,
    CheckpointError,
    DiskSpaceError,
    IncompleteCacheError,
    RecipeError,
    TeacherCacheError,
)
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.pipeline.loading.batch_memory import TensorLayout
from teachercache.pipeline.loading.sampler import ShardShuffleSampler, held_out_samples
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.views import View
from teachercache.student import hub
from teachercache.student.build import load_student
from teachercache.student.models.student import StudentOutput
from teachercache.student.sak.model import SAK
from teachercache.student.similarity import mean_similarity, representation_similarity
from teachercache.student.training.checkpoint import newest_checkpoint
from teachercache.student.training.model_card import recipe_for_card
from teachercache.student.training.preflight import preflight
from teachercache.student.training.run import require_folder
from teachercache.student.training.run_log import names_for, start_trackers
from teachercache.student.training.run_pictures import NUM_ROWS, RunPictures
from teachercache.student.training.train import not_finite, train
from teachercache.student.training.train_recipe import TrainRecipe
from tests.make_cache import build_recipe, commit_shard, make_cache, make_images, teacher_spec
from tests.train_recipes import CONTENT, logged, room_for, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    path = tmp_path_factory.mktemp("cache")
    make_cache(path, images, invalid_samples=[4])
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache like the first, of other images."""
    folder = tmp_path_factory.mktemp("other")
    make_cache(folder / "cache", make_images(folder / "images", 3, seed=1), num_views=1)
    return folder / "cache"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    output = tmp_path_factory.mktemp("run")
    result = train(train_recipe(cache, output))
    assert not result.interrupted
    assert result.steps == 8
    return output


def start_from(finished: Path, step: int, output: Path) -> Path:
    """What a run that died some steps behind its checkpoint leaves."""
    name = f"step_{step:08d}"
    shutil.copytree(finished / "checkpoints" / name, output / "checkpoints" / name)
    shutil.copy(finished / "metrics.jsonl", output)
    return output


def test_a_resumed_run_is_the_same_run(cache: Path, finished: Path, tmp_path: Path) -> None:
    output = start_from(finished, 3, tmp_path)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss"')  # torn by the kill
    result = train(train_recipe(cache, output))
    assert result.steps == 8
    assert logged(output) == logged(finished)
    weights, expected = (load_file(run / "student/model.safetensors") for run in (output, finished))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_a_run_tells_what_it_is_at_and_how_long_it_will_take_without_a_terminal_too(
    cache: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(train_recipe(cache, start_from(finished, 3, tmp_path), log_every_steps=2))
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/8", "6/8", "8/8"]
    one = r"step .* · epoch .* · loss \d+\.\d{4} \(alpha \d.*, beta \d.*\) · lr \d\.\d\de-\d\d · "
    one += r"[\d.]+ img/s · \d:\d\d:\d\d left"
    assert all(re.fullmatch(one, line) for line in lines), lines
    assert lines[-1].endswith("0:00:00 left")
    assert "epoch 1.78/1.78" in lines[-1], "16 of 9 images"
    *_, where, use = told.out.splitlines()
    assert where.endswith(f"student: {tmp_path / 'student'}")
    loaded: dict[str, Any] = {}
    exec(use, loaded)
    assert loaded["student"].teachers == ["alpha", "beta"]


HELD_OUT = {"validation": {"fraction": 0.4, "every_steps": 4}}


def similarities(output: Path) -> dict[int, dict[str, float]]:
    """What was measured, by the step before."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: {key: row[key] for key in row if key.startswith("similarity/")} for row in rows}
    return {step: values for step, values in found.items() if values}


def test_images_that_a_run_validates_on_are_not_trained_on(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    found = preflight(train_recipe(cache, "run", **HELD_OUT), opened.spec, opened)
    assert found.sampler is not None
    assert found.num_samples == found.sampler.num_samples
    rows = np.concatenate([found.sampler.batch(step) for step in range(50)])
    trained = set(opened.index.locate(rows)[0].tolist())
    held_out = set(held_out_samples([opened.key(i) for i in range(10)], 0.4, 0).tolist())
    assert not trained & held_out
    assert trained | held_out | {4} == set(range(10)), "and 4 is quarantined"
    (notice,) = found.notices
    assert f"every 4 steps, on {len(held_out - {4})} images" in notice


def test_a_run_measures_its_student_on_held_out_images(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same steps, to the bit, where it was interrupted."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = train(train_recipe(cache, whole, **HELD_OUT))
    found = similarities(whole)
    assert list(found) == [3, 7]
    assert result.student is not None
    opened = FeatureCache.open(cache)
    held_out = held_out_samples([opened.key(i) for i in range(10)], 0.4, 0)
    sampler = ShardShuffleSampler(opened, batch_size_per_process=4, among=held_out)
    expected = mean_similarity(load_student(result.student), sampler, opened.teachers, sampler.num_samples)
    for name, one in expected.items():
        assert result.similarity[name].levels == pytest.approx(one.levels, abs=1e-5)
        assert found[7][f"similarity/{name}"] == pytest.approx(one.mean, abs=1e-5)
        assert found[7][f"similarity/{name}/level3"] == pytest.approx(one.levels[3], abs=1e-5)
    means = {name: f"{one.mean:.4f}" for name, one in result.similarity.items()}
    told = "step 8/8 · similarity on held-out images: " + ", ".join(map(" ".join, means.items()))
    assert told in capsys.readouterr().err
    assert f"held-out images {means['alpha']} to alpha" in (result.student / "README.md").read_text()
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("similarity/alpha/level0")] == [3, 7]

    train(train_recipe(cache, start_from(whole, 3, resumed), **HELD_OUT))
    assert logged(resumed) == logged(whole)
    assert similarities(resumed) == found
    with pytest.raises(CheckpointError, match=r"validation\.fraction: 0\.3"):
        train(train_recipe(cache, whole, validation={"fraction": 0.3}))


def test_validation_on_a_second_cache_leaves_the_run_what_it_is(
    cache: Path, other: Path, finished: Path, tmp_path: Path
) -> None:
    validation = {"cache": str(other), "every_steps": 3}
    result = train(train_recipe(cache, tmp_path / "run", validation=validation))
    assert logged(tmp_path / "run") == logged(finished)
    assert list(similarities(tmp_path / "run")) == [2, 5, 7]
    states = [
        json.loads((run / "checkpoints/step_00000008/state.json").read_text())
        for run in (tmp_path / "run", finished)
    ]
    assert states[0] == states[1]
    assert result.student is not None
    found = representation_similarity(load_student(result.student), FeatureCache.open(other))
    for name, one in found.items():
        assert result.similarity[name].levels == pytest.approx(one.levels, abs=1e-5)


class Noting(GeneralTracker):
    """What a service would be told."""

    name = "wandb"
    requires_logging_directory = False
    told: ClassVar[dict[str, Any]] = {}

    def __init__(self, project: str, **settings: Any) -> None:
        super().__init__()
        self.told.update(project=project, settings=settings, steps={}, pictures=[])

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told["config"] = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told["steps"][step] = values

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told["pictures"] += [(step, tag, images.shape[0]) for tag, images in values.items()]

    def log_artifact(self, file: str, **about: Any) -> None:
        self.told["artifact"] = json.loads(Path(file).read_text()), about

    def finish(self) -> None:
        self.told["finished"] = self.told.get("finished", 0) + 1


def test_a_tracker_is_told_what_the_run_is_and_of_which_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Noting)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    changes = {"trackers": ["wandb"], "log_every_steps": 3, "picture_every_steps": 8}
    train(train_recipe(cache, tmp_path / "mine", **changes))
    spec = FeatureCache.open(cache).spec
    told = Noting.told
    assert (told["project"], told["settings"]["name"]) == ("teachercache", "mine")
    assert told["config"]["cache_id"] == spec.cache_id
    assert told["config"]["teachers.alpha"] == spec.content_id("alpha")
    assert told["config"]["optimizer.lr"] == 1e-3
    document, about = told["artifact"]
    assert (document["cache_id"], about["name"]) == (spec.cache_id, "cache")
    assert list(told["steps"]) == [2, 5, 7]
    assert told["steps"][5]["epoch"] == pytest.approx(12 / 9)
    assert all(type(value) is float for values in told["steps"].values() for value in values.values())
    assert (7, "maps/alpha", 1) in told["pictures"]
    assert told["finished"] == 1
    for values in (told["config"], *told["steps"].values()):
        assert names_for("wandb", values) is values
        files = names_for("mlflow", values)
        assert len(files) == len(values)
        assert all(re.fullmatch(r"[\w.\- ]+", name) for name in files), "what MLflow allows, but no folders"
    assert not (tmp_path / "mine/tensorboard").exists()


@pytest.mark.parametrize(("name", "word"), [("trackio", "name"), ("swanlab", "experiment_name")])
def test_a_tracker_calls_the_run_as_its_folder_is_called(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Noting)
    start_trackers([name], tmp_path / "mine", {}, FeatureCache.open(cache), first_step=0)
    assert Noting.told["settings"] == {word: "mine"}


def test_a_tracker_that_does_not_start_is_one_message(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Noting):
        def start(self) -> None:
            raise RuntimeError("no account")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Refusing)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    with pytest.raises(RecipeError, match=r"wandb does not start(.|\n)*no account"):
        train(train_recipe(cache, tmp_path, trackers=["wandb"]))


def test_with_accumulation_too_and_whatever_its_split(cache: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(train_recipe(cache, whole, gradient_accumulation_steps=2))
    output = start_from(whole, 3, tmp_path / "resumed")
    train(train_recipe(cache, output, gradient_accumulation_steps=2))
    assert logged(output) == logged(whole)

    other = start_from(whole, 3, tmp_path / "other split")
    train(train_recipe(cache, other, batch_size_per_process=4))
    assert logged(other) == pytest.approx(logged(whole), rel=1e-4)


def test_a_finished_student_says_what_it_is(finished: Path) -> None:
    card = (finished / "student/README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert "sak" in yaml.safe_load(head)["tags"]
    assert set(yaml.safe_load(head)["teacher_licences"].values()) == {"random weights"}
    assert "| alpha | [random weights](#licences) |" in text
    assert "8 steps" in text
    assert "alpha: none, random weights" in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert TrainRecipe.model_validate(yaml.safe_load(recipe)).output == finished.name
    assert str(finished.parent) not in card


def test_a_card_names_no_folder_of_the_machine() -> None:
    recipe = find_recipe(
        TrainRecipe,
        "sak_stage2_pascal_base",
        ["cache=/data/secret/pascal", "multitask.dataset.root=/home/me/PASCAL", "output=/home/me/runs/mine",
         "student.init_from=/home/me/runs/stage1/student", "images=s3://bucket/secret/images",
         "validation.cache=/data/secret/held_out"],
    )  # fmt: skip
    told = recipe_for_card(recipe)
    assert (told["cache"], told["output"], told["images"]) == ("pascal", "mine", "images")
    assert told["multitask"]["dataset"]["root"] == "PASCAL"
    assert told["student"]["init_from"] == "stage1/student"
    assert "secret" not in str(told)
    assert "/home" not in str(told)
    hub = recipe.model_copy(update={"student": recipe.student.model_copy(update={"init_from": "user/sak"})})
    assert recipe_for_card(hub)["student"]["init_from"] == "user/sak"


def test_a_student_is_pushed_with_its_card(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub cannot be reached here, so its client notes what it is asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Noting(HfApi):
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked.append((repo_id, options))

        def upload_folder(self, **options: Any) -> Any:
            asked.append(("upload", options))
            return SimpleNamespace(repo_url="https://huggingface.co/me/sak")

    monkeypatch.setattr(hub, "HfApi", Noting)
    assert hub.push_to_hub(finished / "student", "me/sak", private=True).endswith("me/sak")
    assert asked[0] == ("me/sak", {"private": True, "exist_ok": True})
    options = asked[1][1]
    sent = {path.name for path in Path(options["folder_path"]).iterdir()} & set(options["allow_patterns"])
    assert sent == {"config.json", "model.safetensors", "README.md"}
    with pytest.raises(CheckpointError):
        hub.push_to_hub(finished, "me/sak")


def test_a_finished_run_is_not_run_again(cache: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    result = train(train_recipe(cache, finished))
    assert (result.steps, result.last_loss) == (8, None)
    assert (finished / "metrics.jsonl").read_text() == before


def test_what_a_run_leaves(finished: Path) -> None:
    checkpoints = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert checkpoints == ["step_00000003", "step_00000006", "step_00000008"]
    assert load_student(finished / "student").teachers == ["alpha", "beta"]
    assert logged(finished, "lr")[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert min(logged(finished, "grad_norm")) > 0
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    for tag in ("loss", "cosine/alpha/level3", "smooth_l1/beta/level0", "lr", "grad_norm", "images_per_s"):
        assert tag in events.Tags()["scalars"]
    mean = sum(logged(finished)) / 8
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([mean])


def test_the_maps_of_student_and_teachers_are_drawn(cache: Path, finished: Path, tmp_path: Path) -> None:
    """And change nothing: the run is the same run as without them."""
    train(train_recipe(cache, tmp_path, picture_every_steps=5, log_every_steps=4))
    assert logged(tmp_path) == logged(finished)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert sorted(tags["images"]) == ["maps/alpha", "maps/beta", "norms/alpha", "norms/beta"]
    assert {"seconds/read", "seconds/decode", "seconds/forward", "seconds/backward"} <= set(tags["scalars"])
    for tag in tags["images"]:
        first, last = events.Images(tag)
        assert (first.step, last.step) == (4, 7)
        if tag.startswith("maps"):
            assert first.encoded_image_string != last.encoded_image_string  # the student has learnt
    said = events.Tensors("bottleneck/text_summary")
    assert [event.step for event in said] == [3, 7]
    assert b"Bottleneck: " in said[0].tensor_proto.string_val[0]


def test_the_student_is_drawn_in_the_teachers_colours(cache: Path) -> None:
    """So a student that gives what the teacher gives is drawn as the teacher is."""

    class Copy(SAK):
        def forward(self, pixels_B3HW: torch.Tensor, full: bool = False, maps: bool = True) -> StudentOutput:
            assert not self.training
            return StudentOutput({"alpha": list(maps_SBCHW)}, {}, {})

    opened = FeatureCache.open(cache)
    rows = MapReader(opened, ["alpha"], num_rows=NUM_ROWS).rows
    maps_SBCHW = opened.read(rows, ["alpha"])["alpha"].decode().permute(1, 0, 4, 2, 3)
    student = Copy("test_vit", {"alpha": 8}, (32, 32))
    student.stem.eval()  # one part in another mode than the others
    modes = [module.training for module in student.modules()]
    boards = RunPictures(opened, ["alpha"], student).boards()
    for tag in ("maps/alpha", "norms/alpha"):
        (view, views), *columns = boards[tag].columns
        assert (view, len(views), len(columns)) == ("view", NUM_ROWS, 8)
        for (_, teacher), (_, copy) in zip(columns[::2], columns[1::2], strict=True):
            np.testing.assert_array_equal(teacher, copy)
        assert not np.array_equal(columns[0][1], columns[2][1])
    maps_SBCHW *= 2
    boards = RunPictures(opened, ["alpha"], student).boards()
    norms = maps_SBCHW[0].norm(dim=1)
    low, high = norms.min().item(), norms.max().item()
    titles = [title for title, _ in boards["norms/alpha"].columns]
    assert titles[1:3] == [
        f"teacher\nlevel 1 (block 0)\n{low / 2:.3g} … {high / 2:.3g}",
        f"student\nlevel 1 (block 0)\n{low:.3g} … {high:.3g}",
    ]
    assert boards["maps/alpha"].columns[7][0] == "teacher\nlevel 4 (block 3)"
    assert all("alpha (random weights)" in board.title for board in boards.values())
    assert [module.training for module in student.modules()] == modes
    assert RunPictures(opened, [], student).draw() == {}


def test_the_student_learns(cache: Path, tmp_path: Path) -> None:
    recipe = train_recipe(
        cache,
        tmp_path,
        schedule={"epochs": 12},
        batch_size_per_process=3,
        teachers=["alpha"],
        clip_norm=1.0,
        optimizer={"lr": 3e-4},
    )
    result = train(recipe)
    losses = logged(tmp_path)
    assert len(losses) == 36  # 9 valid samples, 3 a step
    assert result.last_loss == losses[-1]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_bf16_stays_near_float32(cache: Path, other: Path, finished: Path, tmp_path: Path) -> None:
    validation = {"cache": str(other), "every_steps": 8}
    result = train(train_recipe(cache, tmp_path, mixed_precision="bf16", validation=validation))
    assert logged(tmp_path)[0] == pytest.approx(logged(finished)[0], rel=0.02)
    assert result.student is not None
    found = representation_similarity(load_student(result.student), FeatureCache.open(other))
    assert result.similarity["alpha"].levels == pytest.approx(found["alpha"].levels, abs=0.01)


def test_a_loss_that_is_not_finite_ends_the_run(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="no longer finite at step"):
        train(train_recipe(cache, tmp_path, optimizer={"lr": 1e30}, checkpoint_every_steps=100))
    assert not (tmp_path / "checkpoints").exists()


def test_features_that_are_not_finite_are_found(images: Path, tmp_path: Path) -> None:
    """Not blamed on the learning rate."""
    teachers = {"alpha": teacher_spec(codec="bf16"), "beta": teacher_spec()}
    cache = make_cache(tmp_path / "cache", images, teachers=teachers, skip_shards=[1])
    commit_shard(cache, "beta", 1)
    commit_shard(cache, "alpha", 1, value=float("nan"))
    with pytest.raises(FloatingPointError, match=r"since the data are not") as error:
        train(train_recipe(tmp_path / "cache", tmp_path / "run", gradient_accumulation_steps=2))
    assert re.search(r"features of alpha in shard 1, row \d+ \(sample image_00[3-5]\)", str(error.value))
    assert f"teachercache repair {tmp_path / 'cache'}" in str(error.value)
    assert "beta" not in str(error.value)
    assert "lr" not in str(error.value)


@pytest.mark.parametrize(
    ("room", "message"),
    [(10, "The lock of this run"), (2_000, "What the run logs"), (20_000, "The checkpoint of step 3")],
)
def test_a_full_disk_is_one_message(cache: Path, tmp_path: Path, room: int, message: str) -> None:
    recipe = train_recipe(cache, tmp_path)
    if room == 2_000:
        recipe = recipe.model_copy(update={"checkpoint_every_steps": 100})
    with room_for(room), pytest.raises(DiskSpaceError, match=f"{message} cannot be written"):
        train(recipe)
    assert newest_checkpoint(recipe.checkpoint_folder) is None
    assert not list(tmp_path.rglob("*.partial"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(train_recipe(cache, tmp_path))
    assert len(logged(tmp_path)) == 8


def test_labels_that_are_not_finite_are_found(images: Path, cache: Path) -> None:
    opened = FeatureCache.open(cache)

    class Labels:
        layouts: ClassVar[dict[str, TensorLayout]] = {}

        def read(self, sample_key: str, view: View) -> dict[str, torch.Tensor]:
            return {"depth": torch.full((1, 1), float("inf" if sample_key == "image_001" else "1"))}

    rows = opened.index.rows([0, 1], 0)
    assert not_finite(opened, opened.teachers, Labels(), rows) == ["depth of sample image_001"]


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"\x00\xff\xfe\n", b"{}\n", b"[1]\n", b'{"step": "2"}\n', b'{"step": 1, "lo\n', b"\n\n"),
        *(b'{"step": 1, "loss": 9.0}\n', b'{"step": 4}\n'),
    ],
)
def test_lines_that_cannot_be_read_do_not_keep_a_run_from_going_on(
    cache: Path, finished: Path, tmp_path: Path, garbage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    output = start_from(finished, 6, tmp_path)
    lines = (output / "metrics.jsonl").read_bytes().splitlines(True)
    lines.insert(2, garbage)
    (output / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 8, "lo\x00')
    train(train_recipe(cache, output))
    assert logged(output) == logged(finished)
    told = capsys.readouterr().err
    assert f"{garbage.count(10)} lines of metrics.jsonl cannot be read" in told
    assert "2 steps after the last checkpoint are repeated" in told


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    cache: Path, finished: Path, tmp_path: Path
) -> None:
    output = start_from(finished, 6, tmp_path)
    logged_before = (output / "metrics.jsonl").read_bytes()
    (output / "checkpoints").rename(output / "ck")
    with pytest.raises(CheckpointError, match=r"8 steps in (.|\n)*choose another output"):
        train(train_recipe(cache, output))
    (output / "checkpoints").write_bytes(b"")
    with pytest.raises(CheckpointError, match="which is not a folder"):
        train(train_recipe(cache, output))
    assert (output / "metrics.jsonl").read_bytes() == logged_before


def test_a_damaged_newest_checkpoint_costs_its_own_steps(
    cache: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints/step_00000008"
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (tmp_path / "checkpoints/step_00000006").rename(tmp_path / "checkpoints/best")
    train(train_recipe(cache, tmp_path))
    assert logged(tmp_path) == logged(finished)
    told = capsys.readouterr().out
    assert f"{newest}/model.safetensors is damaged" in told
    assert "step_00000008 is set aside as step_00000008.damaged: going on from 3 steps" in told
    assert "not names of checkpoints: best" in told
    assert {path.name for path in newest.parent.iterdir()} == {
        *("best", "step_00000003", "step_00000006", "step_00000008", "step_00000008.damaged")
    }


def test_a_finished_student_without_checkpoints_is_not_trained_over(
    cache: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "student", tmp_path / "student")
    with pytest.raises(CheckpointError, match=r"the student of a finished run(.|\n)*another output"):
        train(train_recipe(cache, tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher_dims", ["alpha"]),
        ("teacher_dims", {"alpha": "8"}),
        ("teacher_dims", {"alpha": 9}),
        ("image_size", 32),
        ("image_size", [32, 32, 32]),
        ("reduction", 0),
        ("of_a_later_version", 1),
        ("tasks", ["semseg"]),
        ("kind", "other"),
        ("kind", ["sak"]),
    ],
)
def test_a_saved_student_with_another_config_is_one_message(
    finished: Path, tmp_path: Path, key: str, value: Any
) -> None:
    shutil.copytree(finished / "student", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(TeacherCacheError):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"lr": 2e-3}}, "optimizer.lr: 0.002"),
        ({"teachers": ["alpha"]}, "teachers.beta"),
        ({"batch_size_per_process": 3}, "images_per_step: 3"),
        ({"seed": 1}, "seed: 1"),
        ({"resume": False}, "resume is false"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    cache: Path, finished: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        train(train_recipe(cache, finished, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache": "nowhere"}, CacheNotFoundError, "nowhere"),
        ({"teachers": ["alhpa"]}, CacheError, "did you mean alpha"),
        ({"batch_size_per_process": 10}, RecipeError, r"at most 9(.|\n)*lower batch_size_per_process or"),
        (
            {"batch_size_per_process": 10, "global_batch_size": 10},
            RecipeError,
            r"at most 9(.|\n)*lower global_batch_size",
        ),
        ({"schedule": {"max_steps": 3, "warmup_steps": 3}}, RecipeError, "not shorter than the run"),
        (
            {"schedule": {"max_steps": 10, "warmup_epochs": 6}},
            RecipeError,
            r"27 steps of warm-up, 10 in all(.|\n)*add schedule.warmup_epochs=0 schedule.warmup_steps=1,",
        ),
        ({"distillation": {"teacher_weights": {"bata": 2}}}, RecipeError, "did you mean beta"),
        ({"student": {"stem": "vit_tiny_patch14_224"}}, RecipeError, "timm has no model"),
    ],
)
def test_what_cannot_be_trained_says_why(
    cache: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(train_recipe(changes.pop("cache", cache), tmp_path, **changes))


def test_an_adjoint_grid_is_for_stems_of_that_grid(tmp_path: Path) -> None:
    spec = teacher_spec(grid=4).model_copy(update={"grid": GridSpec(kind="adjoint", size=(3, 3))})
    images = make_images(tmp_path / "images", 4)
    make_cache(tmp_path / "cache", images, teachers={"alpha": spec})
    message = r"one student grid(.|\n)*\(2, 2\) tokens(.|\n)*\(3, 3\), as in the cache"
    with pytest.raises(RecipeError, match=message):
        train(train_recipe(tmp_path / "cache", tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"preservation": False}}, "kind sak has no preservation"),
        ({"student": {"kind": "kpu", "fusion": "sum", "reduction": 8}}, "kind kpu has no fusion, reduction"),
        ({"distillation": {"image_weight": 7}}, "image_weight: only a kpu"),
    ],
)
def test_settings_of_another_kind_of_student_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_recipe(Path("cache"), Path("run"), **changes)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"stem": "test_vit2"}, r"got: +student\.stem: test_vit2\n.*student\.stem: test_vit\n"),
        ({"reduction": 8}, r"got: +student\.reduction: 8\n.*student\.reduction: 4\n"),
        ({"adapter_paths": False}, r"student\.adapter_paths: False\n.*student\.adapter_paths: True\n"),
    ],
)
def test_a_student_that_goes_on_is_not_another(
    cache: Path, finished: Path, tmp_path: Path, student: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(train_recipe(cache, tmp_path, student={"init_from": str(finished / "student")} | student))


@pytest.mark.parametrize("student", [{}, {"stem": "test_vit", "reduction": 4}])
def test_a_student_goes_on_as_it_is(
    cache: Path, finished: Path, tmp_path: Path, student: dict[str, Any]
) -> None:
    changes = {"student": {"init_from": str(finished / "student")} | student, "schedule": {"max_steps": 1}}
    assert train(train_recipe(cache, tmp_path, **changes)).steps == 1


def test_a_student_that_grows_keeps_the_licences_of_its_teachers(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(finished / "student", tmp_path / "first")
    card = (first / "README.md").read_text()
    (first / "README.md").write_text(card.replace("alpha: random weights", "alpha: dinov3-license"))
    make_cache(tmp_path / "cache", images, teachers={"late": teacher_spec()})
    changes = {"student": {"init_from": str(first)}, "schedule": {"max_steps": 1}}
    train(train_recipe(tmp_path / "cache", tmp_path / "grown", **changes))
    licences = hub.teacher_licences(tmp_path / "grown/student")
    assert (licences["alpha"], licences["late"]) == ("dinov3-license", "random weights")
    (first / "README.md").unlink()
    train(train_recipe(tmp_path / "cache", tmp_path / "again", **changes))
    assert hub.teacher_licences(tmp_path / "again/student")["alpha"] == "not stated"


def test_low_rank_updates_leave_the_stem_of_a_growing_student_alone(
    images: Path, cache: Path, finished: Path, tmp_path: Path
) -> None:
    lora = {"student": {"init_from": str(finished / "student"), "lora_rank": 2}, "schedule": {"max_steps": 1}}
    make_cache(tmp_path / "cache", images, teachers={"late": teacher_spec()})
    with pytest.raises(RecipeError, match=r"keeps its stem(.|\n)*lora_rank=null"):
        train(train_recipe(tmp_path / "cache", tmp_path / "grown", **lora))
    assert train(train_recipe(cache, tmp_path / "same teachers", **lora)).steps == 1


def test_a_cache_that_is_not_complete_is_refused(images: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", images, skip_shards=[1])
    with pytest.raises(IncompleteCacheError, match="run the same build command again"):
        train(train_recipe(tmp_path / "cache", tmp_path / "run"))


def test_a_hybrid_run_reads_what_is_there_and_runs_the_rest(images: Path, tmp_path: Path) -> None:
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "codec": "f32"}
    teachers = {"tiny": tiny, "late": tiny | {"random_seed": 1}}
    cache = build(build_recipe(tmp_path / "cache", images, teachers=teachers), Console(quiet=True)).cache
    losses = {}
    for features in ("cached", "hybrid"):
        recipe = train_recipe(tmp_path / "cache", tmp_path / features, features=features)
        train(recipe)
        losses[features] = logged(tmp_path / features, "loss/late/level0")
        cache.storage.remove("commits/late/00001.json")
    assert losses["hybrid"] == pytest.approx(losses["cached"], rel=1e-5)
    cache.storage.remove("commits/tiny/00000.json")
    with pytest.raises(RecipeError, match=r"at least one teacher(.|\n)*no complete one of tiny, late"):
        train(recipe.model_copy(update={"output": str(tmp_path / "none")}))


def test_a_cache_without_a_valid_sample_is_refused(images: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", images, invalid_samples=range(10))
    with pytest.raises(CacheError, match="no sample to train on"):
        train(train_recipe(tmp_path / "cache", tmp_path / "run"))


def test_a_teacher_of_more_levels_is_refused(images: Path, tmp_path: Path) -> None:
    five = teacher_spec().model_copy(update={"block_indices": (0, 1, 2, 3, 4)})
    make_cache(tmp_path / "cache", images, teachers={"five": five})
    with pytest.raises(RecipeError, match="5 levels in the cache"):
        train(train_recipe(tmp_path / "cache", tmp_path / "run"))


@pytest.mark.parametrize("adapter_paths", [True, False])
def test_a_teacher_of_fewer_levels_goes_to_the_last_ones(
    images: Path, tmp_path: Path, adapter_paths: bool
) -> None:
    one = teacher_spec().model_copy(update={"block_indices": (3,)})
    teachers = {"four": teacher_spec(), "one": one}
    make_cache(tmp_path / "cache", images, teachers=teachers)
    student = CONTENT["student"] | {"adapter_paths": adapter_paths}
    result = train(train_recipe(tmp_path / "cache", tmp_path / "run", student=student, picture_every_steps=4))
    assert logged(tmp_path / "run", "loss/one/level0")
    with pytest.raises(KeyError):
        logged(tmp_path / "run", "loss/one/level1")
    assert result.student is not None
    similar = representation_similarity(load_student(result.student), FeatureCache.open(tmp_path / "cache"))
    assert [len(similarity.levels) for similarity in similar.values()] == [4, 1]


SCENES = {"kind": "scenes", "root": "."}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": []}, "at least one"),
        ({"schedule": {}}, "epochs and max_steps"),
        ({"validation": {}}, "a cache of other images, or a fraction"),
        ({"validation": {"fraction": 0.1, "cache": "other"}}, "a cache of other images, or a fraction"),
        ({"trackers": ["wandbb"]}, "trackers.0"),
        ({"multitask": {"dataset": SCENES, "tasks": []}}, "at least 1 item"),
        ({"multitask": {"dataset": SCENES, "weights": {"semseg": -1}}}, "greater than or equal to 0"),
        ({"multitask": {"dataset": SCENES | {"fraction": 0}}}, "greater than 0"),
        ({"distillation": {"teacher_weights": {"alpha": -1}}}, "greater than or equal to 0"),
        ({"schedule": {"epochs": 2, "warmup_epochs": 1, "warmup_steps": 5}}, "not both"),
        ({"student": {"stem": None}}, "only an amalgam"),
        ({"student": {"kind": "amalgam", "stem": None, "lora_rank": 2}}, "leave out lora_rank"),
        ({"student": {"lora_rank": 2, "freeze": ["stem"]}}, "leave out one of the two"),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_recipe("cache", "run", **changes)


@pytest.mark.parametrize(
    ("size", "student"), [("small", "vit_small"), ("base", "vit_base"), ("large", "vit_large")]
)
def test_the_recipes_of_stage_1_are_those_of_the_paper(size: str, student: str) -> None:
    recipe = find_recipe(TrainRecipe, f"sak_stage1_{size}")
    assert str(recipe.student.stem).startswith(student)
    assert recipe.images_per_step(num_processes=8) == 128  # and what follows, from Table 11
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.clip_norm) == (1e-3, 1e-2, 0)
    assert recipe.schedule.steps(1_281_167 / 128) == (300_274, 20_019)


def test_the_trainer_loads_neither_ray_nor_the_builder() -> None:
    code = (
        "import sys, teachercache.student.training.train; assert not {'ray', "
        "'teachercache.cache_builder'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_output_that_is_no_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecipeError, match=r"output folder cannot be made(.|\n)*choose another output"):
            require_folder(output)


def test_ctrl_c_is_no_traceback() -> None:
    code = "from teachercache.jobs.launch import run\ndef main():\n    raise KeyboardInterrupt\nrun(main)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (130, 1)
