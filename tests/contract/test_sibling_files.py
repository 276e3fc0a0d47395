"""A file of another cache in a cache's place: who notices?

That is what a restore of the wrong copy does, and `rsync` between caches of one recipe. Each file of a cache
is replaced by that of a sibling, sound in itself and with sound checksums; the table in docs/operations.md
says which check finds it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.pipeline.errors import CacheError, TeacherCacheError
from teachercache.pipeline.rearranging.convert import convert
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.spec import StoreKind
from teachercache.pipeline.verify import verify
from tests.images import encode, photo, tar_bytes, write_folder
from tests.make_cache import build_recipe

QUIET = Console(quiet=True)
TINY = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32}
TEACHERS = {
    "tiny": TINY | {"codec": "int8-hadamard", "cls_token": True},
    "twin": TINY | {"codec": "int8-hadamard", "cls_token": True, "random_seed": 1},
}
SIBLINGS = [
    "other views",
    "other weights",
    "other images",
    "one other image",
    "other labels",
    "an older copy",
]
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
CHECKS = ("verify", "verify --full", "reading")
_OF_THE_MOMENT = {"seconds", "host", "worker", "versions", "finished", "checksum"}


def images(folder: Path, seed: int = 0, label: str = "cat", only: int | None = None) -> Path:
    """A tar of eight photographs and a file that is none, with labels. Their sizes do not depend on `seed`.

    `only`: the one picture that `seed` changes.
    """
    members: list[tuple[str, bytes]] = []
    for i in range(9):
        drawn = 10 * seed + i if only in (None, i) else i
        data = encode(photo(48, 40, drawn)) if i != 7 else b"<html>%d</html>" % drawn
        members += [(f"image_{i}.jpg", data.ljust(1500, b"\0")), (f"image_{i}.cls", label.encode())]
    return write_folder(folder, {"set.tar": tar_bytes(members)})


def _build(
    root: Path, name: str, source: Path, views: Mapping[str, int] = {}, weights: int = 0, store: str = "zarr"
) -> Path:
    teachers = {teacher: {"random_seed": weights} | recipe for teacher, recipe in TEACHERS.items()}
    policy = {"num_views": 2, "size": [32, 32], **views}
    recipe = build_recipe(
        root / name, source, teachers=teachers, views=policy, images="copy", store=store, rows_per_shard=6
    )
    build(recipe, QUIET)
    return root / name


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def caches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The cache under "this", which has grown by a view, and its siblings."""
    root, store = tmp_path_factory.mktemp("siblings"), request.param
    source = images(root / "images")
    this = _build(root, "this", source, store=store)
    older = Path(shutil.copytree(this, root / "older"))
    _build(root, "this", source, {"num_views": 3}, store=store)
    others = {
        "other views": _build(root, "views", source, {"num_views": 3, "seed": 1}, store=store),
        "other weights": _build(root, "weights", source, {"num_views": 3}, weights=7, store=store),
        "other images": _build(root, "images_", images(root / "more", 1), {"num_views": 3}, store=store),
        "one other image": _build(
            root, "one", images(root / "one_", 1, only=4), {"num_views": 3}, store=store
        ),
        "other labels": _build(root, "labels", images(root / "dogs", label="dog"), store=store),
    }
    return {"this": this, "an older copy": older, **others}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kind_of(name: str) -> str:
    """The line of the table in the docs."""
    kinds = {
        r"(cache\.json|samples\.parquet|views\.parquet)": r"`\1`",
        r"commits/.*": "commit record",
        r"images/.*": "image tar",
        r"quarantine/.*": "quarantine list",
        r"stats/[^/]*": "`stats/<teacher>.safetensors`",
        r"stats/.*/.*": "statistics of a shard",
        r".*(zarr|teacher)\.json": "`zarr.json`, `teacher.json`",
        r"teachers/.*": "shard",
    }
    return next(re.sub(pattern, kind, name) for pattern, kind in kinds.items() if re.fullmatch(pattern, name))


def read_all(folder: Path) -> None:
    """All that a training run and a look at the cache read."""
    cache = FeatureCache.open(folder)
    for sample in cache.valid_samples().tolist():
        cache.image(sample)
        rows = cache.index.rows(sample, np.arange(cache.num_views))
        for teacher, features in cache.read(rows).items():
            features.decode()
            if cache.spec.teachers[teacher].cls_token:
                cache.read_tokens(rows, teacher, "cls")
    assert cache.views.view(0)
    for teacher in cache.teachers:
        cache.statistics(teacher)


def finds(check: Callable[[], object]) -> bool:
    try:
        return bool(check())
    except TeacherCacheError:
        return True


def found_by(folder: Path) -> dict[str, bool]:
    return {
        "verify": finds(lambda: verify(FeatureCache.open(folder))),
        "verify --full": finds(lambda: verify(FeatureCache.open(folder), full=True)),
        "reading": finds(lambda: read_all(folder)),
    }


def same_meaning(one: bytes, other: bytes, name: str) -> bool:
    """Whether they differ in nothing but when, where and how fast a shard was computed."""
    if one == other or not name.startswith("commits/"):
        return one == other
    before, after = (json.loads(data) for data in (one, other))
    return all(before[key] == after[key] for key in before.keys() - _OF_THE_MOMENT)


def replacements(caches: Mapping[str, Path]) -> Iterator[tuple[str, str, bytes]]:
    """(whose, file of this cache, the bytes that come into its place), of shard 1."""
    this = caches["this"]
    for name in names(this):
        if (number := re.search(r"/(?:c/)?0*(\d+)(?=[./]|$)", name)) and number[1] != "1":
            continue
        for sibling in SIBLINGS:
            if (other := caches[sibling] / name).exists():
                yield sibling, name, other.read_bytes()
        for place in (
            re.sub(r"/(0*)1(?=[./]|$)", r"/\g<1>0", name, count=1),
            name.replace("/tiny/", "/twin/"),
        ):
            if place != name and (this / place).exists():
                yield "another place in this cache", name, (this / place).read_bytes()


@pytest.fixture(scope="module")
def found(caches: dict[str, Path]) -> dict[tuple[str, str], dict[str, bool]]:
    """By (whose, file): which checks find it."""
    this, results = caches["this"], dict[tuple[str, str], dict[str, bool]]()
    tried = set[tuple[str, str]]()
    for whose, name, data in replacements(caches):
        path, before = this / name, (this / name).read_bytes()
        if same_meaning(before, data, name) or (whose, kind_of(name)) in tried:
            continue
        tried.add((whose, kind_of(name)))
        path.write_bytes(data)
        try:
            results[whose, name] = found_by(this)
        finally:
            path.write_bytes(before)
    assert not any(found_by(this).values())  # it is whole again
    return results


def test_every_file_of_a_sibling_is_found(found: Mapping[tuple[str, str], Mapping[str, bool]]) -> None:
    assert {whose for whose, _ in found} == {*SIBLINGS, "another place in this cache"}
    assert not [what for what, checks in found.items() if not checks["verify --full"]]


def test_the_docs_say_which_check_finds_what(found: Mapping[tuple[str, str], Mapping[str, bool]]) -> None:
    """A cell says yes where the check finds every such file, and no where it lets any pass."""
    cells = defaultdict[str, list[Mapping[str, bool]]](list)
    for (_, name), checks in found.items():
        cells[kind_of(name)].append(checks)
    table = {kind: [all(row[check] for row in rows) for check in CHECKS] for kind, rows in cells.items()}
    rows = re.findall(r"^\| (.+?) \| (yes|no) \| (yes|no) \| (yes|no) \|$", DOCS.read_text(), re.MULTILINE)
    stated = {kind: [cell == "yes" for cell in row] for kind, *row in rows}
    assert stated == {kind: table.get(kind, stated.get(kind)) for kind in stated.keys() | table.keys()}


@pytest.mark.parametrize("what", ["shards", "teachers"])
def test_what_is_made_of_exchanged_files_is_refused(
    caches: dict[str, Path], tmp_path: Path, what: str
) -> None:
    """New checksums would make what is wrong right."""
    folder = Path(shutil.copytree(caches["this"], tmp_path / "cache"))
    cache = FeatureCache.open(folder)
    other: StoreKind = "webdataset" if cache.spec.store == "zarr" else "zarr"
    pair = [("tiny", 0), ("tiny", 1)] if what == "shards" else [("tiny", 0), ("twin", 0)]
    for one, two in zip(*(cache.store.shard_files(*place) for place in pair), strict=True):
        first, second = (folder / one).read_bytes(), (folder / two).read_bytes()
        (folder / one).write_bytes(second)
        (folder / two).write_bytes(first)
    keys = ["image_0"]
    for derive in (
        lambda: convert(str(folder), str(tmp_path / "converted"), other),
        lambda: subset(str(folder), str(tmp_path / "subset"), keys=keys),
        lambda: subset(str(folder), str(tmp_path / "teacher"), teachers=["tiny"]),
    ):
        with pytest.raises(CacheError, match=r"(?s)(is not the file|broken).*teachercache (verify|repair)"):
            derive().run()
