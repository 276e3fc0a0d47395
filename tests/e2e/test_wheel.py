"""The wheel outside the checkout: its verbs and recipes, from images to a student, and no extra at all."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.make_cache import build_recipe, make_images
from tests.train_recipes import train_recipe
from tests.wheel import ROOT, Wheel

PACKAGES = ("pipeline", "cache_builder", "student", "jobs")
INNER = {  # reached through a module that says which extra is missing
    *(f"student.training.{name}" for name in ("environment", "loop", "run_lock")),
    *("cache_builder.ray_cluster", "cache_builder.ray_runner", "pipeline.places.s3_patience"),
}

VERBS = """
import teachercache, typer
from typer.testing import CliRunner
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.jobs.cli import app
from teachercache.jobs.recipes import find_recipe

print(teachercache.__file__)
for verb in typer.main.get_command(app).commands:
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0 and f"teachercache {verb}" in done.output, done.output
print(find_recipe(BuildRecipe, "demo").source.path)
"""

USE = """
import sys, torch
from teachercache import FeatureCache, load_student

cache = FeatureCache.open(sys.argv[1])
assert cache[0].features("tiny").isfinite().all()
student = load_student(sys.argv[2])
maps = student(student.normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
assert maps["tiny"][-1].isfinite().all()
print(*{"ray", "gradio", "matplotlib", "accelerate", "skimage", "xarray"} & set(sys.modules))
"""

# Python finds no package that `pip install teachercache` does not bring, however many are installed.
LIGHT = """
import importlib, io, json, pkgutil, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from importlib.machinery import PathFinder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

wanted, brought = [("teachercache", ()), ("setuptools", ())], set()
while wanted:
    name, extras = wanted.pop()
    brought.add((canonicalize_name(name), extras))
    for needed in map(Requirement, metadata.requires(name) or ()):
        asked = (needed.name, tuple(sorted(needed.extras)))
        holds = any(not needed.marker or needed.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if holds and (canonicalize_name(asked[0]), asked[1]) not in brought:
            wanted.append(asked)
brought = {name for name, _ in brought}
hidden = {
    module
    for module, packages in metadata.packages_distributions().items()
    if not brought & {canonicalize_name(package) for package in packages}
}
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *places: None if name in hidden else find_spec(name, *places)

import teachercache
from teachercache import FeatureCache
from teachercache.jobs.cli import main


def ended(call):
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            call()
    except SystemExit as end:
        return end.code or 0, shown.getvalue()
    except Exception as error:
        return type(error).__name__, str(error)
    return 0, shown.getvalue()


def verb(*words):
    sys.argv = ["teachercache", *words]
    return ended(main)


names = [module.name for module in pkgutil.walk_packages(teachercache.__path__, "teachercache.")]
names = [name for name in names if not name.endswith("__main__")]
given = json.load(open(sys.argv[1]))
report = {
    "hidden": sorted(hidden),
    "verbs": [verb(*words) for words in given["verbs"]],
    "modules": {name: ended(lambda: importlib.import_module(name)) for name in names},
    "to_xarray": ended(FeatureCache.open(given["cache"]).to_xarray),
}
print("\\n" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def cache(wheel: Wheel, folder: Path) -> Path:
    images = make_images(folder / "images", 4)
    recipe = build_recipe(folder / "cache", images, views={"num_views": 1, "size": [32, 32]})
    (folder / "build.yaml").write_text(recipe.model_dump_json())
    printed = wheel.python(wheel.folder / "bin/teachercache", "build", "build.yaml", folder=folder)
    assert "4 views in" in printed
    return folder / "cache"


@pytest.fixture(scope="module")
def student(wheel: Wheel, folder: Path, cache: Path) -> Path:
    recipe = train_recipe(cache, folder / "run", schedule={"max_steps": 2, "warmup_steps": 1})
    (folder / "train.yaml").write_text(recipe.model_dump_json())
    launch = ("-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1)
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no")
    wheel.python(*launch, *plain, "-m", "teachercache.jobs.train_student", "train.yaml", folder=folder)
    return folder / "run/student"


def test_the_archives_hold_files_and_no_links(wheel: Wheel) -> None:
    shipped = {
        f"teachercache/{path.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"teachercache/__init__.py"}
    with zipfile.ZipFile(wheel.archive) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == shipped
    with tarfile.open(wheel.sdist) as sources:
        members = [member for member in sources.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert {name for name in names if name.startswith("teachercache/")} == shipped
    texts = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "constraints.txt"}
    assert texts | {"pyproject.toml"} <= names


def test_building_them_warns_of_nothing(wheel: Wheel) -> None:
    assert re.findall(r".*(?:warning|deprecat).*", wheel.log, re.I) == []


def test_every_verb_helps_and_recipes_are_found(wheel: Wheel, tmp_path: Path) -> None:
    first, *_ = wheel.python("-c", VERBS, folder=tmp_path).splitlines()
    assert first == str(wheel.folder / "teachercache/__init__.py")


def test_launchers_run_as_modules_and_as_files(wheel: Wheel, tmp_path: Path) -> None:
    script = "teachercache/jobs/train_student.py"
    wheel.python("-m", "teachercache.jobs.train_student", "--help", folder=tmp_path)
    wheel.python(wheel.folder / script, "--help", folder=tmp_path)


def test_a_cache_is_read_and_a_student_used_without_what_others_need(
    wheel: Wheel, cache: Path, student: Path, tmp_path: Path
) -> None:
    assert wheel.python("-c", USE, cache, student, folder=tmp_path).strip() == ""


@pytest.fixture(scope="module")
def light(wheel: Wheel, folder: Path, cache: Path) -> dict[str, Any]:
    """What verbs, imports and calls say where no extra is installed."""
    given = {"cache": str(cache), "verbs": [words.split() for words in (*WORK, *NEED)]}
    (folder / "given.json").write_text(json.dumps(given))
    printed = wheel.python("-c", LIGHT, "given.json", folder=folder)
    report: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert {"ray", "gradio", "matplotlib", "accelerate", "s3fs", "pytest"} <= set(report["hidden"])
    return report


WORK = ("recipes", "presets", "codecs", "help-keys train", "inspect cache", "verify cache", "plan build.yaml")
NEED = {
    "view cache": "gradio view",
    "report cache": "matplotlib view",
    "inspect cache --pictures maps.png": "matplotlib view",
    "inspect s3://bucket/cache": "aiobotocore s3",
    "build build.yaml cache=another runner.kind=ray": "ray build",
    "plan build.yaml cache=another teachers=[grounding_dino_tiny]": "transformers grounding-dino",
    "train sak_stage1_base cache=cache output=another": "matplotlib train",
    "probe cache cache": "accelerate train",
    "depth-probe student nyud data": "accelerate train",
    "norms cache one two": "accelerate train",
    "zeroshot classify student cache --classes build.yaml --clip nowhere": "accelerate train",
    "figure 1": "accelerate train",
    "evaluate student pascal_context data": "accelerate train",
    "train-decoders kpu_decoders_frozen": "accelerate train",
}


@pytest.mark.parametrize("verb", WORK)
def test_a_verb_works_without_any_extra(light: dict[str, Any], verb: str) -> None:
    status, printed = light["verbs"][WORK.index(verb)]
    assert status == 0, printed


@pytest.mark.parametrize("verb", NEED)
def test_a_verb_says_which_extra_it_needs(light: dict[str, Any], folder: Path, verb: str) -> None:
    package, extra = NEED[verb].split()
    status, printed = light["verbs"][len(WORK) + list(NEED).index(verb)]
    line = f"Error: This needs {package}, which is not installed: pip install 'teachercache[{extra}]'"
    assert (status, printed.splitlines()[-1]) == (1, line)
    assert not (folder / "another").exists()


def test_what_python_imports_or_calls_says_it_too(light: dict[str, Any]) -> None:
    errors = {name.partition(".")[2]: told for name, told in light["modules"].items() if told[0] != 0}
    raw = {name for name, (error, _) in errors.items() if error != "MissingExtraError"}
    assert raw == INNER
    rooms = {name: text.split("[")[-1] for name, (_, text) in errors.items() if name not in INNER}
    assert rooms["student.training.train"] == rooms["student.measuring"] == "train]'"
    assert rooms["jobs.inspection.viewer"] == rooms["jobs.inspection.report"] == "view]'"
    told = "This needs xarray, which is not installed: pip install 'teachercache[view]'"
    assert light["to_xarray"] == ["MissingExtraError", told]
