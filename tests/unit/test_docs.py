"""What the pages name is there: links, files, modules, verbs with their options, keys of recipes, classes."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from teachercache.cache_builder.build_recipe import BuildRecipe, RepairRecipe, WeightsRecipe
from teachercache.jobs.cli import app
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.recipe_files import check_recipe, load_overrides, load_recipe
from teachercache.student.training.decoder_recipe import DecoderRecipe
from teachercache.student.training.train_recipe import TrainRecipe

ROOT = Path(__file__).parents[2]
EXTENDING = ROOT / "docs/extending.md"  # names what its examples add, and has a test of its own
PAGES = sorted({*ROOT.glob("*.md"), ROOT / "infra/README.md", *(ROOT / "docs").glob("*.md")} - {EXTENDING})
CODE = ("pipeline", "cache_builder", "student", "jobs", "tests", "benchmarks", "examples", "infra")
VERBS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
MODELS: dict[str, type[Any]] = {
    **dict.fromkeys(("plan", "build", "calibrate", "submit"), BuildRecipe),
    **dict.fromkeys(("jobs/cache_teachers.py", "teachercache.jobs.cache_teachers"), BuildRecipe),
    **dict.fromkeys(("train", "jobs/train_student.py", "teachercache.jobs.train_student"), TrainRecipe),
    "train-decoders": DecoderRecipe,
    "verify": WeightsRecipe,
    "repair": RepairRecipe,
}
NOT_THERE = {"jobs/inspect"}  # docs/design.md says why
OF_OTHERS = {
    *("AbortIncompleteMultipartUpload", "calc_feature_mean"),  # of S3 and of Theia
    *("ActorPool", "request_resources", "ElasticJobsViaWorkloadSlices"),  # of Ray and of Kueue
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for written_in, text in blocks if written_in == language]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[list[str]]:
    """In words: the lines of blocks without a language, less what is said behind them, and inline code."""
    lines = [
        re.split(r"\s{3,}", re.sub(r"^(teachercache \S+)\s+", r"\1 ", line.strip()))[0]
        for block in fenced(page, "")
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
    ]
    found = []
    for line in lines + inline(page):
        try:
            found.append(shlex.split(line))
        except ValueError:  # an apostrophe in what is said
            found.append(line.split())
    return [words for words in found if words]


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link that stays in the project."""
    found = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in found]


def unknown_keys(model: type[Any], overrides: list[str]) -> list[str]:
    try:
        load_overrides(model, overrides, "of a page")
    except RecipeError as error:
        return [line for line in str(error).splitlines() if "unknown key" in line]
    return []


@pytest.mark.parametrize("page", [*PAGES, EXTENDING], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists()
        heads = re.findall(r"^#+ (.*)$", prose(target), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {target for page in new for target, _ in links(page) if target.suffix == ".md"} - reached
    assert reached >= {*PAGES, EXTENDING}


@each_page
def test_files_and_folders_are_there(page: Path) -> None:
    files = re.findall(rf"(?<![\w/.~-])((?:{'|'.join(CODE)}|docs|teachercache)/[\w./-]*)", page.read_text())
    missing = {file for file in files if not (ROOT / file.rstrip(".")).exists()}
    assert missing - NOT_THERE == set()


@each_page
def test_modules_and_their_names_are_there(page: Path) -> None:
    for name in set(re.findall(r"(?<![\w/.])teachercache(?:\.\w+)+", page.read_text())):
        found, parts = import_module("teachercache"), name.split(".")
        for end, part in enumerate(parts[1:], 2):
            found = getattr(found, part, None) or import_module(".".join(parts[:end]))
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("teachercache"):
                assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names)


@each_page
def test_modules_that_are_run_know_their_options(page: Path) -> None:
    for words in commands(page):
        if words[:2] == ["python", "-m"]:
            spec = find_spec(words[2])
            assert spec, words
            assert spec.origin
            source = Path(spec.origin).read_text()
            if "benchmarks.studies" in source:  # which has the options of all miniatures
                source += (ROOT / "benchmarks/studies.py").read_text()
            options = [word for word in words if word.startswith("--")]  # argparse's, or arguments for typer
            assert [
                one for one in options if f'"{one}"' not in source and f" {one[2:]}: " not in source
            ] == []


@each_page
def test_verbs_have_the_options_that_are_used(page: Path) -> None:
    for words in commands(page):
        if words[0] == "teachercache" and re.fullmatch(r"[a-z][a-z-]*", " ".join(words[1:2])):
            assert words[1] in VERBS, words
            verb = VERBS[words[1]]
            if members := getattr(verb, "commands", {}):  # a group, whose verb comes next
                assert len(words) < 3 or words[2] in members, words
                verb = members.get(words[2] if words[2:] else "", verb)
            parameters = verb.params
            known = {name for one in parameters for name in (*one.opts, *one.secondary_opts)}
            used = [word for word in words[2:] if re.fullmatch(r"--?[a-z][a-z-]*", word.strip("[]"))]
            assert {word.strip("[]") for word in used} <= known, words


def test_every_verb_is_on_a_page() -> None:
    named = {tuple(words[:2]) for page in PAGES for words in commands(page)}
    assert {("teachercache", verb) for verb in VERBS} <= named


@each_page
def test_recipes_of_commands_load(page: Path) -> None:
    """Those that ship, with the overrides of the command; of others, keys are known to their model."""
    for words in commands(page):
        start = next((i for i, word in enumerate(words) if word in MODELS), None)
        launchers = ("teachercache", "accelerate", "torchrun", "ray")
        if start is None or words[0] not in launchers or "help-keys" in words:
            continue
        model, recipe = MODELS[words[start]], " ".join(words[start + 1 : start + 2])
        overrides = [word for word in words[start + 2 :] if re.fullmatch(r"[a-z_]\w*(\.\w+)*=.+", word)]
        if model in (BuildRecipe, TrainRecipe, DecoderRecipe) and re.fullmatch(r"[a-z]\w*", recipe):
            load_recipe(model, ROOT / f"jobs/recipes/{recipe}.yaml", overrides)
        else:
            assert unknown_keys(model, overrides) == [], words


@each_page
def test_keys_of_recipes_are_known(page: Path) -> None:
    """Of inline code such as `views.num_views=4` and `runner.max_attempts`."""
    for code in inline(page):
        key, _, value = code.partition("=")
        is_file = key.startswith("cache.") or key.endswith((".parquet", ".json"))
        if re.fullmatch(r"[a-z_]\w*(\.\w+)+", key) and not is_file and not value.startswith("="):
            models = [
                m for m in (BuildRecipe, TrainRecipe, DecoderRecipe) if key.split(".")[0] in m.model_fields
            ]
            assert not models or any(not unknown_keys(model, [f"{key}=x"]) for model in models), code
            assert models or not value, code


@each_page
def test_yaml_is_of_a_recipe(page: Path) -> None:
    for block in fenced(page, "yaml"):
        check_recipe(BuildRecipe, {"cache": "x", "source": "y"} | yaml.safe_load(block), "of a page")


@each_page
def test_targets_and_extras_are_there(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {words[1] for words in commands(page) if words[0] == "make" and words[1:]} <= set(targets)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"teachercache\[([\w-]+)\]", page.read_text())) <= extras.keys()


@cache
def words_of_the_code() -> set[str]:
    files = [file for folder in CODE for file in (ROOT / folder).rglob("*.*")] + [ROOT / "pyproject.toml"]
    kept = [file for file in files if file.suffix in (".py", ".yaml", ".toml") and file != Path(__file__)]
    return set(re.findall(r"\w+", "\n".join(file.read_text() for file in kept)))


@each_page
def test_names_of_the_code_are_in_the_code(page: Path) -> None:
    """Classes, functions and keys in inline code: what has capitals within, or an underscore."""
    names = [
        name
        for code in inline(page)
        if re.fullmatch(r"[\w.]+(\([^()]*\))?", code)
        for name in re.findall(r"[A-Za-z_]\w*", re.sub(r"^ray_|_total$", "", code))  # as Prometheus has them
        if re.search(r"[a-z][A-Z]|[a-z]_[a-zA-Z]", name)
    ]
    assert set(names) - words_of_the_code() - OF_OTHERS == set()


def test_shapes_of_the_glossary_are_those_of_the_names() -> None:
    shapes = re.findall(r"`(\w+_([A-Za-z]+))` \(([^()]*)\)", (ROOT / "docs/glossary.md").read_text())
    assert len(shapes) >= 8
    assert [suffix for _, suffix, _ in shapes] == [axes.replace(", ", "") for *_, axes in shapes]
    assert {name for name, *_ in shapes} <= words_of_the_code()
