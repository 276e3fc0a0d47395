"""Caches on the Hugging Face Hub: pushed, read by ranges and pulled, against a server that speaks its API."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import xarray
import yaml
import zarr
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import (
    CacheError,
    CacheMismatchError,
    CacheNotFoundError,
    IncompleteCacheError,
    LicenceError,
    SourceError,
    StorageError,
)
from teachercache.pipeline.places import retries
from teachercache.pipeline.places.hub_storage import CARD_FILE, CROISSANT_FILE
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.manifest import QuarantineEntry
from teachercache.pipeline.records.tables import SAMPLE_SCHEMA, VIEW_SCHEMA
from teachercache.pipeline.sharing.licences import require_shareable
from teachercache.pipeline.sharing.push import push_cache
from teachercache.pipeline.verify import verify
from tests.hub_server import READER, WRITER, HubServer, Repository, running_hub
from tests.images import tar_bytes
from tests.make_cache import make_cache, make_images, teacher_spec

URL = "hf://datasets/me/cache"  # what `pushed` pushes

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")  # huggingface_hub's own


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("made") / "images", 6)


@pytest.fixture(scope="module")
def cache(images: Path) -> FeatureCache:
    """Three teachers of the same shape, two shards each; one image is quarantined."""
    teachers = {name: teacher_spec(width=16, grid=6) for name in ("alpha", "beta", "gamma")}
    made = make_cache(images.parent / "cache", images, teachers=teachers, invalid_samples=[1])
    entry = QuarantineEntry(sample_index=1, key=made.key(1), location="image_001.jpg", reason="cut")
    made.manifest.write_quarantine(0, [entry])
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with running_hub() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", WRITER)
        disable_progress_bars()
        yield server
        enable_progress_bars()


@pytest.fixture(scope="module")
def pushed(server: HubServer, cache: FeatureCache) -> Repository:
    assert push_cache(cache.storage.url, "me/cache") == f"{server.url}/datasets/me/cache"
    return server.repositories["datasets/me/cache"]


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """For one test: whatever it asks for has not been asked before."""
    monkeypatch.setattr(server, "fault", lambda method, path: None)
    server.repositories = {
        name: one for name, one in server.repositories.items() if name.endswith("me/cache")
    }
    server.blobs.clear()
    server.requests.clear()
    server.served.clear()
    return server


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def files_of(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_pushed_cache_is_the_original_byte_for_byte(pushed: Repository, cache: FeatureCache) -> None:
    beside = {CARD_FILE, CROISSANT_FILE}
    there = {name: data for name, data in pushed.files.items() if name not in beside}
    assert there == files_of(cache.storage.url)
    assert pushed.commits[-1] == sorted([*beside, "cache.json"])
    assert not list(Path(cache.storage.url).parent.glob("*.push-*"))


def test_it_is_opened_where_it_is_and_equals_the_original(pushed: Repository, cache: FeatureCache) -> None:
    opened, rows = FeatureCache.open(URL), cache.index.rows(np.array([0, 2, 5]), 1)
    for name in cache.teachers:
        assert torch.equal(opened.feature_maps(name, rows), cache.feature_maps(name, rows))
    assert verify(opened, full=True) == []
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301
    assert torch.equal(again.feature_maps("beta", rows), cache.feature_maps("beta", rows))


def test_rows_that_the_hub_refuses_are_one_message(
    pushed: Repository, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FeatureCache.open(URL)
    monkeypatch.setattr(hub, "fault", lambda method, path: 403 if "codes/c/" in path else None)
    with pytest.raises(StorageError, match=r"(?s)cannot be read.*403.*HF_TOKEN") as raised:
        opened.feature_maps("alpha", np.array([0]))
    assert "repair" not in str(raised.value)


@pytest.mark.parametrize(("status", "passes"), [(503, True), (429, True), (403, False)])
def test_an_answer_of_the_hub_that_passes_is_read_again(status: int, passes: bool) -> None:
    response = httpx2.Response(status, request=httpx2.Request("GET", "http://here"))
    assert retries.is_passing(HfHubHTTPError("refused", response=response)) is passes


def test_zarr_and_xarray_read_it_as_its_card_says(pushed: Repository, cache: FeatureCache) -> None:
    row = cache.feature_maps("alpha", np.array([0]))[0].numpy()
    codes = zarr.open_group(f"{URL}/teachers/alpha", mode="r")["codes"]
    assert isinstance(codes, zarr.Array)
    np.testing.assert_array_equal(codes[0], row)
    opened = xarray.open_zarr(f"{URL}/teachers/alpha", consolidated=False)
    np.testing.assert_array_equal(opened["codes"][0], row)


def test_reading_one_teacher_of_three_fetches_a_third(
    pushed: Repository, hub: HubServer, cache: FeatureCache
) -> None:
    def fetched(teachers: list[str]) -> int:
        hub.served.clear()
        opened = FeatureCache.open(URL)
        opened.read(opened.index.rows(opened.valid_samples()[:, None], np.arange(2)).ravel(), teachers)
        read = {name: nbytes for name, nbytes in hub.served.items() if name.startswith("teachers/")}
        assert {name.split("/")[1] for name in read} == {*teachers}
        return sum(read.values())

    assert 3 * fetched(["beta"]) == fetched(cache.teachers)


def test_pull_fetches_some_teachers_and_nothing_of_others(
    pushed: Repository, hub: HubServer, cache: FeatureCache, tmp_path: Path
) -> None:
    invoke("pull", "hf://datasets/me/cache", tmp_path / "part", "--teachers", "alpha,gamma")
    assert not [name for name in hub.served if "beta" in name]
    part, rows = FeatureCache.open(tmp_path / "part"), np.array([0, 5])
    assert verify(part, full=True) == []
    assert part.teachers == ["alpha", "gamma"]
    assert torch.equal(part.feature_maps("gamma", rows), cache.feature_maps("gamma", rows))


def test_pull_of_a_sample_fetches_its_rows_alone(
    pushed: Repository, hub: HubServer, cache: FeatureCache, tmp_path: Path
) -> None:
    key = cache.key(4)
    (tmp_path / "keys.txt").write_text(key)
    choice = ("--keys", tmp_path / "keys.txt", "--teachers", "beta", "--levels", "-1,0")
    invoke("pull", "me/cache", tmp_path / "part", *choice)
    part, rows = FeatureCache.open(tmp_path / "part"), cache.index.rows(4, np.arange(2))
    assert part.samples["key"].to_pylist() == [key]
    expected = cache.feature_maps("beta", rows)[:, [0, 3]]
    assert torch.equal(part.feature_maps("beta", np.arange(2)), expected)
    assert not [name for name in hub.served if "codes/c/0" in name]


def test_an_interrupted_push_looks_like_no_cache_and_is_continued(
    hub: HubServer, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "api/datasets/me/cut/commit/main"
    monkeypatch.setattr(
        hub, "fault", lambda method, asked: 403 if asked == path and hub.count("POST", path) > 1 else None
    )
    with pytest.raises(CacheError, match=r"(?s)not pushed to me/cut.*403.*run the same command again"):
        push_cache(cache.storage.url, "me/cut")
    assert len(hub.repositories["datasets/me/cut"].files) > 10
    with pytest.raises(CacheNotFoundError, match=r"(?s)hf://datasets/me/cut without.*push-cache. again"):
        FeatureCache.open("hf://datasets/me/cut")
    monkeypatch.setattr(hub, "fault", lambda method, asked: None)
    sent = hub.count("PUT", "lfs/")
    assert sent > 5
    push_cache(cache.storage.url, "me/cut")
    assert hub.count("PUT", "lfs/") == sent
    assert FeatureCache.open("hf://datasets/me/cut").spec == cache.spec


def test_a_file_that_is_not_taken_ends_a_push_before_anything_is_there(
    hub: HubServer, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hub, "fault", lambda method, _: 400 if method == "PUT" and hub.count("PUT", "lfs/") == 3 else None
    )
    with pytest.raises(CacheError, match=r"(?s)not pushed.*Bad request"):
        push_cache(cache.storage.url, "me/stopped")
    assert hub.repositories["datasets/me/stopped"].files == {}


def test_a_push_in_many_commits_ends_with_what_makes_it_a_cache(
    hub: HubServer, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub pushes where hf_xet is installed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub._upload_pipeline.COMMIT_SIZE_SCALE", [5] * 10)
    monkeypatch.setattr(hub, "takes_all", True)
    push_cache(cache.storage.url, "me/many")
    first, *_, last = hub.repositories["datasets/me/many"].commits
    assert len(first) == 5
    assert "cache.json" in last
    assert FeatureCache.open("hf://datasets/me/many").spec == cache.spec


def laid_out(cache: FeatureCache) -> set[Path]:
    """What pushes left beside the cache, for the same push to go on with."""
    place = Path(cache.storage.url)
    return set(place.parent.glob(f"{place.name}.push-*"))


def test_a_repository_that_holds_something_else_is_left_alone(
    hub: HubServer, cache: FeatureCache, images: Path, tmp_path: Path
) -> None:
    hub.repositories["datasets/me/text"] = text = Repository(
        files={"train.csv": b"a,b", ".gitattributes": b""}
    )
    before = laid_out(cache)
    with pytest.raises(
        CacheMismatchError, match=r"(?s)something else.*1 other files, such as train\.csv.*name"
    ):
        push_cache(cache.storage.url, "me/text")
    assert text.commits == []
    assert laid_out(cache) == before
    with pytest.raises(CacheNotFoundError, match=r"(?s)hf://datasets/me/text without a cache\.json"):
        FeatureCache.open("hf://datasets/me/text")
    other = make_cache(tmp_path / "other", images, teachers={"alpha": teacher_spec(width=4)})
    push_cache(other.storage.url, "me/other")
    with pytest.raises(
        CacheMismatchError, match=r"(?s)me/other holds something else.*cache\.json of another cache"
    ):
        push_cache(cache.storage.url, "me/other")


def test_a_cache_that_grew_is_pushed_over_what_it_was(hub: HubServer, cache: FeatureCache) -> None:
    push_cache(cache.storage.url, "me/grown", teachers=["beta"])
    assert FeatureCache.open("hf://datasets/me/grown").teachers == ["beta"]
    sent = hub.count("PUT", "lfs/")
    push_cache(cache.storage.url, "me/grown")
    assert hub.count("PUT", "lfs/") == sent + 4  # the shards of two more teachers
    assert FeatureCache.open("hf://datasets/me/grown").spec == cache.spec


def test_what_a_licence_restricts_is_public_only_when_told(
    hub: HubServer, images: Path, tmp_path: Path
) -> None:
    dinov3 = teacher_spec().model_copy(
        update={"model": "vit_large_patch16_dinov3.lvd1689m", "pretrained": True}
    )
    made = make_cache(tmp_path / "made", images, teachers={"dinov3": dinov3, "beta": teacher_spec()})
    with pytest.raises(LicenceError, match=r"(?s)dinov3 is under dinov3-license.*--accept-licences"):
        push_cache(made.storage.url, "me/dinov3")
    assert hub.requests == []
    push_cache(made.storage.url, "me/dinov3", private=True)
    there = hub.repositories["datasets/me/dinov3"]
    assert there.private
    card = there.files[CARD_FILE].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["license_name"]) == ("other", "dinov3-license")
    assert header["teacher_licences"] == {"dinov3": "dinov3-license", "beta": "random weights"}
    assert "only under this licence and with a copy of it" in card
    push_cache(made.storage.url, "me/beta", teachers=["beta"])
    invoke("push-cache", made.storage.url, "me/public", "--accept-licences")
    assert not hub.repositories["datasets/me/public"].private


@pytest.mark.parametrize(
    "location",
    ["pipe:curl -H 'Authorization: Bearer hidden' https://host/a.tar", "https://me:hidden@host/a",
     "https://host/a.tar?sig=hidden", '{"a": {"path": "pipe:echo \\"x\\" hidden", "kind": "tar"}}'],
)  # fmt: skip
def test_no_key_in_the_place_of_the_images_is_pushed(
    location: str, hub: HubServer, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_cache(tmp_path / "made", images)
    dataset = made.spec.dataset.model_copy(update={"location": location})
    made.manifest.write_spec(made.spec.model_copy(update={"dataset": dataset}))
    push_cache(made.storage.url, "me/made")
    assert "may hold a key" in caplog.text
    there = hub.repositories["datasets/me/made"].files
    assert not [name for name, data in there.items() if b"hidden" in data]
    assert FeatureCache.open(made.storage.url).spec.dataset.location == location
    with pytest.raises(SourceError, match="opened only if you name it"):
        FeatureCache.open("hf://datasets/me/made").images.read_source(0)


def test_copies_of_images_are_public_only_when_told() -> None:
    with pytest.raises(LicenceError, match="copies of 6 images, whose licence is not known here"):
        require_shareable({"beta": "apache-2.0"}, copied_images=6)


def test_nothing_private_is_pushed_to_what_is_public(pushed: Repository, cache: FeatureCache) -> None:
    with pytest.raises(CacheError, match=r"(?s)me/cache is public.*make it private in its settings"):
        push_cache(cache.storage.url, "me/cache", private=True)


@pytest.mark.parametrize(("token", "status"), [(READER, 403), ("", 401)])
def test_a_token_without_rights_is_told_of(
    token: str, status: int, hub: HubServer, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    before = laid_out(cache)
    with pytest.raises(CacheError, match=rf"(?s)not pushed to me/new.*{status}.*a token that may write"):
        push_cache(cache.storage.url, "me/new")
    assert "datasets/me/new" not in hub.repositories
    assert laid_out(cache) == before
    hub.repositories["datasets/me/secret"] = Repository(private=True)
    if not token:
        with pytest.raises(CacheNotFoundError, match=r"(?s)hf auth login"):
            FeatureCache.open("hf://datasets/me/secret")


def test_licences_beside_a_cache_are_no_hindrance(hub: HubServer, cache: FeatureCache) -> None:
    beside = {"LICENSE.md": b"Terms.", "NOTICE": b"Names."}
    hub.repositories["datasets/me/bound"] = Repository(files=dict(beside))
    push_cache(cache.storage.url, "me/bound")
    there = hub.repositories["datasets/me/bound"].files
    assert {name: there[name] for name in beside} == beside


def test_an_incomplete_cache_is_not_pushed(hub: HubServer, images: Path, tmp_path: Path) -> None:
    made = make_cache(tmp_path / "made", images, skip_shards=[1])
    with pytest.raises(IncompleteCacheError, match="1 of 2 shards missing"):
        push_cache(made.storage.url, "me/made")
    assert hub.requests == []


def test_nothing_is_written_to_the_hub_file_by_file(pushed: Repository, cache: FeatureCache) -> None:
    with pytest.raises(CacheError, match=r"(?s)file by file.*push-cache"):
        subset(cache.storage.url, URL, fraction=0.5)


def test_the_card_says_what_how_and_how_to_load(pushed: Repository, cache: FeatureCache) -> None:
    _, header, text = pushed.files[CARD_FILE].decode().split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["license"] == "unknown"
    assert [config["data_files"] for config in told["configs"]] == ["samples.parquet", "views.parquet"]
    assert (
        "Features of 6 images, in 2 views of 32 × 32 pixels each, by 3 frozen vision models: 12 rows" in text
    )
    assert "| beta | none | random: a trial, no use | 0, 1, 2, 3 | 6 × 6 × 16 (native) | f32 |" in text
    made = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    assert made["views"] == cache.spec.views.model_dump(mode="json")
    assert cache.spec.cache_id in text
    code = re.findall(r"```python\n(.*?)```", text, re.S)
    assert {name for block in code for name in ("xarray", "zarr", "datasets") if f"import {name}" in block}
    used = ast.unparse(ast.parse("\n".join(code)))
    assert f"FeatureCache.open('{URL}')" in used
    assert "$" not in text


def test_croissant_describes_the_tables_that_are_there(pushed: Repository) -> None:
    told = json.loads(pushed.files[CROISSANT_FILE])
    hashes = {entry["@id"]: entry.get("sha256") for entry in told["distribution"]}
    fields = {records["name"]: [field["name"] for field in records["field"]] for records in told["recordSet"]}
    assert fields == {"samples": SAMPLE_SCHEMA.names, "views": VIEW_SCHEMA.names}
    for name in ("samples.parquet", "views.parquet"):
        assert hashes[name] == hashlib.sha256(pushed.files[name]).hexdigest()


def test_a_tar_on_the_hub_streams_by_in_one_request(hub: HubServer, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in make_images(tmp_path, 20, size=(320, 240)).iterdir()]
    tar = tar_bytes((f"{number:03d}.jpg", image) for number, image in enumerate(images))
    hub.repositories["datasets/me/tars"] = Repository(files={"set.tar": tar})
    place = "hf://datasets/me/tars/set.tar"
    found = make_cache(tmp_path / "cache", place, num_views=1, samples_per_shard=20)
    named = FeatureCache.open(found.storage.url, images=place)
    assert named.images.read_source(0) == images[0]
    hub.requests.clear()
    assert list(named.images.stream_source(range(20))) == images
    assert hub.count("GET", "set.tar") == 1
