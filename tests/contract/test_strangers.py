"""A stranger's cache sends nobody anywhere: a URL in `cache.json` is opened only by who names it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import s3fs
from typer.testing import CliRunner

from teachercache import FeatureCache
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.repair import repair
from teachercache.jobs.cli import app
from teachercache.jobs.inspection.explorer import Explorer
from teachercache.jobs.inspection.report import write_report
from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.own_places import is_followed
from teachercache.pipeline.recipe_files import load_recipe
from teachercache.pipeline.records.manifest import Manifest
from tests.make_cache import make_cache, make_images
from tests.train_recipes import train_recipe


class Counting(SimpleHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def log_message(self, *arguments: object) -> None:
        self.requests.append(str(arguments))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture(scope="module")
def host(images: Path) -> Iterator[str]:
    """A server inside the network, which also answers for every bucket."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(images))) as server:
        threading.Thread(target=server.serve_forever).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            s3fs.S3FileSystem.clear_instance_cache()
            yield f"127.0.0.1:{server.server_port}"
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


LOCATIONS = (
    "http://{host}/",
    "http://{host}/image_000.jpg",
    "simplecache::http://{host}/",
    "/data/images::http://{host}/",
    "webhdfs://{host}/images",
    "s3://bucket/images",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_cache(folder / "cache", images)
    return folder / "cache"


def strange(original: Path, place: Path, location: str) -> str:
    """A copy of the cache whose images are said to be at `location`."""
    shutil.copytree(original, place)
    manifest = Manifest(open_storage(place))
    spec = manifest.spec()
    dataset = spec.dataset.model_copy(update={"location": location})
    manifest.write_spec(spec.model_copy(update={"dataset": dataset}))
    return str(place)


def repaired(url: str) -> Any:
    (Path(url) / "samples.parquet").unlink()
    return repair(FeatureCache.open(url)).left


def viewed(url: str) -> str:
    explorer = Explorer(FeatureCache.open(url))
    return explorer.strip([0, 1], explorer.first()) + explorer.board(explorer.first())


LOOKS: dict[str, Callable[[str], Any]] = {
    "notebook": lambda url: FeatureCache.open(url)[0]._repr_html_(),
    "report": lambda url: write_report(FeatureCache.open(url), num_samples=2),
    "view": lambda url: (lambda e: e.strip([0, 1], e.first()) + e.board(e.first()))(
        Explorer(FeatureCache.open(url))
    ),
    "repair": repaired,
}
VERBS = {
    "inspect": "inspect {url}",
    "verify": "verify {url} --full",
    "subset": "subset {url} -o {tmp}/subset --fraction 0.5",
    "convert": "convert {url} -o {tmp}/tars --to webdataset",
}
ASKING = {
    "pictures": "inspect {url} --pictures {tmp}/maps.png",
    "norms": "norms {url} image_000 image_001 -o {tmp}/norms.png",
    "theia": "convert {url} -o {tmp}/theia --to theia",
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_what_only_looks_asks_nobody(host: str, original: Path, tmp_path: Path, location: str) -> None:
    Counting.requests.clear()
    url = strange(original, tmp_path / "cache", location.format(host=host))
    for words in VERBS.values():
        result = CliRunner().invoke(app, words.format(url=url, tmp=tmp_path).split())
        assert result.exit_code == 0, (words, result.output, result.exception)
    for words in ASKING.values():
        result = CliRunner().invoke(app, words.format(url=url, tmp=tmp_path).split())
        assert isinstance(result.exception, SourceError), (words, result.output, result.exception)
        assert "--images PATH" in str(result.exception)
    for look in LOOKS.values():
        look(url)
    assert Counting.requests == []


def test_training_asks_for_images(host: str, original: Path, tmp_path: Path) -> None:
    from teachercache.student.training.train import train

    Counting.requests.clear()
    url = strange(original, tmp_path / "cache", f"http://{host}/")
    with pytest.raises(SourceError, match="images=PATH for `teachercache train`"):
        train(train_recipe(url, tmp_path / "run"))
    assert Counting.requests == []


def test_who_names_the_url_gets_the_images(host: str, original: Path, images: Path, tmp_path: Path) -> None:
    Counting.requests.clear()
    url = strange(original, tmp_path / "cache", f"http://{host}/")
    assert FeatureCache.open(url, images=f"http://{host}/").image(0).size == (64, 48)
    assert Counting.requests
    assert FeatureCache.open(url, images=str(images)).image(0).size == (64, 48)


@pytest.mark.parametrize(
    ("location", "cache", "followed"),
    [
        ("/data/images", "/data/cache", True),
        ("file:///data/images", "/data/cache", True),
        ("/data/images", "s3://bucket/cache", True),
        ("s3://bucket/images", "s3://bucket/cache", True),
        ("s3://bucket/train-*.tar", "s3://bucket", True),
        ("s3://other/images", "s3://bucket/cache", False),
        ("s3://bucket.evil/images", "s3://bucket/cache", False),
        ("gs://bucket/images", "s3://bucket/cache", False),
        ("s3://bucket/images", "/data/cache", False),
        ("https://host/images", "https://host/cache", False),
        ("ssh://host/images", "ssh://host/cache", False),
        ("github://a:b@main/", "/data/cache", False),
        ("zip://x::file:///data/images.zip", "/data/cache", False),
        ("filecache::s3://bucket/images", "s3://bucket/cache", False),
        ("HTTP://host/", "/data/cache", False),
    ],
)
def test_what_is_followed(location: str, cache: str, followed: bool) -> None:
    assert is_followed(location, cache) == followed


def test_a_recipe_says_which_variables_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By name; the value is nobody's business. Nested, decoded and overriding ones, too."""
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("WHICH", "SECRET")
    monkeypatch.setenv("VIEWS", "3")
    text = "cache: /c/${oc.env:${oc.env:WHICH}}\nsource: /s/${oc.env:NOT_SET,x}\nteachers: [dinov2_small]\n"
    (tmp_path / "r.yaml").write_text(text)
    overrides = ["views.num_views=${oc.decode:${oc.env:VIEWS}}"]
    loaded = load_recipe(BuildRecipe, tmp_path / "r.yaml", overrides)
    assert (loaded.cache, loaded.source.path, loaded.views.num_views) == ("/c/hunter2", "/s/x", 3)
    (said,) = caplog.messages
    assert said == f"recipe {tmp_path}/r.yaml takes from the environment: NOT_SET, SECRET, VIEWS, WHICH"
    caplog.clear()
    (tmp_path / "r.yaml").write_text("cache: /c\nsource: /s\nteachers: [dinov2_small]\n")
    load_recipe(BuildRecipe, tmp_path / "r.yaml")
    assert caplog.messages == []
