"""Paths are printed as they are, on one line, whatever looks like markup, an emoji or too long in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from teachercache import build_student
from teachercache.jobs import launch
from teachercache.jobs.cli import app
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.terminal import Terminal, in_markdown, progress_bar
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.measuring.linear_probe import Probe, probe_table
from tests.make_cache import make_cache, make_images

ODD = Path("[b]x[/b] [/red]") / ":smile:" / "_very_long_" / ("long" * 40) / "a*b `c` [x](y)"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / ODD
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def cache(odd: Path) -> Path:
    make_cache(odd / "cache", make_images(odd / "images", 4))
    return odd / "cache"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})


def printed(result: Result, *paths: object) -> None:
    """Each path is on a line, whole."""
    lines = result.output.splitlines()
    assert result.exit_code == 0, (result.output, result.exception)
    for path in paths:
        assert any(str(path) in line for line in lines), result.output


def test_verbs_that_look_and_rearrange(cache: Path, odd: Path, tmp_path: Path) -> None:
    printed(run("inspect", cache), cache, odd / "images")
    printed(run("inspect", cache, "--pictures", odd / "maps.png"), odd / "maps.png")
    printed(run("report", cache, "-o", odd / "report.html", "--samples", 1), odd / "report.html")
    printed(run("norms", cache, "image_000", "image_001", "-o", odd / "n.png"), odd / "n.png")
    printed(run("subset", cache, "-o", odd / "subset", "--fraction", "0.5"), odd / "subset")
    printed(run("convert", cache, "-o", odd / "tars", "--to", "webdataset"), odd / "tars")
    printed(run("convert", cache, "-o", odd / "theia", "--to", "theia"), odd / "theia")
    printed(run("repair", cache), cache)
    (odd / "subset" / "views.parquet").unlink()
    broken = run("verify", odd / "subset")
    assert broken.exit_code == 1
    assert f"`teachercache repair {shlex.quote(str(odd / 'subset'))}`" in broken.output
    mended = run("repair", odd / "subset")
    printed(mended, odd / "subset", "mended: views.parquet")


def test_verbs_that_build(odd: Path, cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "cache: null\nsource: null\nrows_per_shard: 4\nviews: {size: [32, 32]}\nteachers:\n"
        "  tiny: {model: vit_tiny_patch16_224, pretrained: false, codec: f16}\n"
    )
    words = recipe, f"cache={odd / 'built'}", f"source.path={odd / 'images'}"
    printed(run("plan", *words), odd / "built", odd / "images")
    printed(run("build", *words), odd / "built")
    grown = run("build", *words, "views.num_views=2")
    printed(grown, f"The cache at {odd / 'built'} grows by 1 views of each sample.")
    printed(run("build", *words, "views.num_views=2"), f"{odd / 'built'}: complete")


def test_verbs_of_students_and_data_sets(odd: Path) -> None:
    write_scenes(odd / "scenes", train=1, val=1)
    linked = run("datasets", "scenes", odd / "scenes", "--link", odd / "links")
    printed(linked, *(shlex.quote(f"source.path={odd / 'links' / split}") for split in ("train", "val")))
    student = build_student("sak", stem="test_vit", teacher_dims={"a": 8, "b": 8}, image_size=(32, 32))
    student.save_pretrained(odd / "student")
    printed(run("remove-teacher", odd / "student", "b", "-o", odd / "smaller"), odd / "smaller")


def test_errors_name_paths_as_they_are(
    odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def fail() -> None:
        raise CacheError("Wrong.", got=odd, do=f"run: teachercache repair {odd}")

    with pytest.raises(SystemExit):
        launch.run(fail)
    error = capsys.readouterr().err
    assert error == f"Error: Wrong.\n  got:      {odd}\n  do:       run: teachercache repair {odd}\n"
    usage = run("[b]x[/b]:smile:")
    assert (usage.exit_code, "[b]x[/b]:smile:" in usage.output) == (2, True)


def test_what_is_under_way_may_be_called_anything() -> None:
    with open("/dev/null", "w") as file:  # noqa: PTH123
        console = Terminal(file=file, force_terminal=True)
        with console.status("[/b]") as status:
            status.update("reading [/red] :smile:")
        with progress_bar(console) as bar:
            bar.add_task("[/b]", total=1)


def test_tables_in_markdown_show_names_as_they_are() -> None:
    from rich.markdown import Markdown

    name = str(Path("runs") / ODD).replace("long" * 40, "long")
    probe = Probe(name, 50.0, 0.1, 8, 2, 4, 4, 1)
    console = Terminal(width=300, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(Markdown(probe_table([probe])))
        assert name in console.export_text()
    assert in_markdown("runs/base_small/student-2") == "runs/base_small/student-2"


def test_nothing_else_makes_a_terminal() -> None:
    """What rich's own console prints would be looked through for markup."""
    root = Path(__file__).parents[2]
    folders = ("jobs", "cache_builder", "student", "pipeline")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert len(files) > 100
    assert [path.name for path in files if re.search(r"\bConsole\(", path.read_text())] == []
