"""docs/extending.md: its files and changes go into a copy of the checkout, and its code runs there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.make_cache import make_images

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text()
PACKAGES = ("pipeline", "cache_builder", "student", "jobs")

RUN = """
import json, sys, traceback

results, names = {}, {}
for title, code in json.load(sys.stdin):
    try:
        exec(compile(code, title, "exec"), names)
        results.setdefault(title, "")
    except BaseException:
        results[title] = traceback.format_exc()
print("\\n" + json.dumps(results))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page: `file` is what its first line names, one of the checkout or, without a
    folder, of the reader; None for code that is run."""

    section: str
    language: str
    file: str | None
    text: str


def blocks() -> list[Block]:
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        title = section.split("\n", 1)[0]
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S):
            named = re.match(r"# ([\w/]+\.\w+)\n", text)
            found.append(Block(title, language, named and named[1], text[named.end() :] if named else text))
    return found


BLOCKS = blocks()
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))


def apply(change: str, text: str) -> str:
    """`text` with each place of a diff changed, which must be there exactly once."""
    for place in change.split("@@\n"):
        lines = place.splitlines(keepends=True)
        assert all(line[0] in " +-\n" for line in lines), place
        old = "".join(line.removeprefix(" ")[line[0] == "-" :] for line in lines if line[0] != "+")
        new = "".join(line.removeprefix(" ")[line[0] == "+" :] for line in lines if line[0] != "-")
        assert text.count(old) == 1, f"not there exactly once:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with everything that the page adds."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("teachercache", *PACKAGES):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for block in BLOCKS:
        if block.file is None or "/" not in block.file:
            continue
        target = folder / block.file
        assert target.exists() == (block.language == "diff"), block.file
        target.write_text(apply(block.text, target.read_text()) if block.language == "diff" else block.text)
    return folder


@pytest.fixture(scope="module")
def results(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By section: the traceback of its code, or nothing."""
    folder = tmp_path_factory.mktemp("story")
    for old, new in zip(sorted(make_images(folder / "photos", 2).iterdir()), "ab", strict=True):
        old.rename(old.with_name(f"{new}.jpg"))
    for block in BLOCKS:
        if block.file and "/" not in block.file:
            (folder / block.file).write_text(block.text)
    code = [(block.section, block.text) for block in BLOCKS if block.file is None]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        input=json.dumps(code),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_what_the_page_says_works(section: str, results: dict[str, str]) -> None:
    assert results[section] == ""


def test_what_the_page_adds_keeps_the_style_of_the_project(checkout: Path) -> None:
    files = sorted({block.file for block in BLOCKS if block.file and block.file.endswith(".py")})
    for command in (["check", "--no-cache"], ["format", "--check", "--diff", "--no-cache"]):
        ruff = [sys.executable, "-m", "ruff", *command, *files]
        done = subprocess.run(ruff, cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_row_of_the_table_has_its_section() -> None:
    rows = re.findall(r"^\| an? \[(.*?)\]\(#(.*?)\)", PAGE, re.M)
    assert [anchor for _, anchor in rows] == [title.lower().replace(" ", "-") for title in SECTIONS]
