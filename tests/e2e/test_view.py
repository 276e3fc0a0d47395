"""`teachercache view`: the page in a real browser, and what its server answers to others."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from teachercache import build_student
from teachercache.jobs.inspection.explorer import PAGE_SIZE, Explorer
from teachercache.jobs.inspection.viewer import listen, make_server
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, TeacherCacheError
from teachercache.student.models.student import Student
from tests.browser import Browser
from tests.make_cache import make_cache, make_images, teacher_spec
from tests.s3_server import Server, running, server  # noqa: F401  (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # gradio's

TEACHERS = {"alpha": teacher_spec(grid=4), "beta <b>": teacher_spec(width=4, grid=3, codec="f16")}
HOSTILE = "<img src=x onerror=alert(1)>"
TIMEOUT_S = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("images"), 14)
    (folder / "image_013.jpg").rename(folder / f"{HOSTILE}.jpg")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, images: Path) -> FeatureCache:
    """14 samples (two pages) of 2 views in shards of 3 samples; sample 4 is quarantined."""
    folder = tmp_path_factory.mktemp("view") / "cache"
    return make_cache(folder, images, teachers=TEACHERS, invalid_samples=[4])


@pytest.fixture(scope="module")
def student() -> Student:
    return build_student(
        "sak", stem="test_vit", teacher_dims={"alpha": 8}, image_size=(32, 32), pretrained=False
    ).eval()


@contextmanager
def serving(cache: FeatureCache, student: Student | None = None) -> Iterator[str]:
    with listen("127.0.0.1") as listener:
        server = make_server(Explorer(cache, student), "127.0.0.1")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield "http://{}:{}/".format(*listener.getsockname())
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(cache: FeatureCache) -> Iterator[str]:
    with serving(cache) as address:
        yield address


class Board:
    """The page as a person uses it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        page.set_default_timeout(TIMEOUT_S * 1000)
        page.goto(url)
        page.locator("#board img.map").first.wait_for()
        page.locator("#strip button").first.wait_for()

    def maps(self) -> list[str]:
        """Data URIs, teacher by teacher; in each of them column by column."""
        return list(self.page.locator("#board img.map").evaluate_all("all => all.map(one => one.src)"))

    def tiles(self) -> list[str]:
        return list(self.page.locator("#strip button").evaluate_all("all => all.map(one => one.title)"))

    def titles(self) -> str:
        return str(self.page.locator("#board").inner_text())

    def after(self, action: Callable[[], object], part: str = "#board .board") -> None:
        """Act, and wait until that part of the page says something else."""
        before = self.page.locator(part).inner_html()
        action()
        self.page.wait_for_function(
            "([part, before]) => ![before, undefined].includes(document.querySelector(part)?.innerHTML)",
            arg=[part, before],
        )

    def click_patch(self, cell: int, x: float, y: float) -> None:
        """In the cell (0: the photograph, then those maps that can be clicked)."""
        box = self.page.locator("#board .pick").nth(cell).bounding_box()
        place = box["x"] + x * box["width"], box["y"] + y * box["height"]
        self.after(lambda: self.page.mouse.click(*place))

    def choose(self, dropdown: str, option: str) -> None:
        self.page.locator(f"#{dropdown} input").click()
        self.after(lambda: self.page.get_by_role("option", name=option, exact=True).click())

    def tile(self, number: int) -> Any:
        return self.page.locator("#strip button").nth(number)


LAYOUT = """() => {
    const found = [], seen = [];
    for (const part of document.querySelectorAll("body *")) {
        const box = part.getBoundingClientRect(), style = getComputedStyle(part);
        if (part.clientWidth <= 1 || box.height <= 1) continue;
        if (!part.checkVisibility({visibilityProperty: true})) continue;
        const text = part.textContent.trim().slice(0, 30);
        const name = `${part.tagName} #${part.id} .${part.className}: ${text}`;
        if (box.left < -1 || box.right > innerWidth + 1) found.push(`outside: ${name}`);
        if (part.scrollWidth > part.clientWidth + 1 && style.textOverflow !== "ellipsis")
            found.push(`too narrow: ${name}`);
        if (part.matches("button, input, textarea, label, #count, .pick")) seen.push([part, box, name]);
    }
    for (const [i, [one, a, first]] of seen.entries())
        for (const [other, b, second] of seen.slice(i + 1))
            if (!one.contains(other) && !other.contains(one)
                && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
                found.push(`overlap: ${first} and ${second}`);
    return found;
}"""
SIDES = "(({left, right}) => [left, right])(document.querySelector('main').getBoundingClientRect())"
CONTROL = r"- (?:button|checkbox|combobox|listbox|radio|searchbox|textbox)\b(?: \"([^\"]*)\")?"
LIBRARY_NAMES = {"", "Textbox", "Dropdown", "Radio", "CheckboxGroup", "Checkbox Group", "Button"}


def assert_nothing_is_cut(page: Any) -> None:
    """At five widths: all is inside the window, in its middle and whole, no control lies on another, and each
    has a name."""
    usual = page.viewport_size
    page.wait_for_function("!document.querySelector('.options')")  # a list that was open fades out
    for width in (390, 500, 1280, 1500, 1920):
        page.set_viewport_size({"width": width, "height": 720})
        assert page.evaluate(LAYOUT) == [], width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        left, right = page.evaluate(SIDES)
        assert abs(left + right - page.evaluate("document.documentElement.clientWidth")) <= 1, width
    names = re.findall(CONTROL, page.locator("body").aria_snapshot())
    assert len(names) > PAGE_SIZE
    assert not LIBRARY_NAMES & set(names)
    page.set_viewport_size(usual)


def pixels(uri: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def expected_maps(
    cache: FeatureCache, teacher: str, rows: list[int], level: int, patch: tuple[int, int]
) -> list[NDArray[np.uint8]]:
    """Cosines of the patch (column, line) of the first row to it and to the other, as viridis shows them."""
    here, there = (cache.read([row], [teacher])[teacher].decode()[0, level].double().numpy() for row in rows)
    token = here[patch[1], patch[0]]
    cosines = [
        tokens @ token / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(token) for tokens in (here, there)
    ]
    low = min(values.min() for values in cosines)
    return [
        colormaps["viridis"]((values - low) / (1 - low), bytes=True)[..., :3].astype(np.uint8)
        for values in cosines
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_person_looks_into_it(
    cache: FeatureCache,
    url: str,
    browser: Browser,
    scheme: str,
) -> None:
    with browser.page(scheme) as page:
        board = Board(page, url)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        assert "random weights: alpha, beta <b>" in page.locator("#headline").inner_text()

        keys = cache.samples["key"].to_pylist()
        assert board.tiles() == keys[:PAGE_SIZE]
        board.after(page.locator("#forward").click, "#strip .strip")
        assert board.tiles() == keys[PAGE_SIZE:]
        page.locator("#forward").click()  # there is no third page
        board.after(page.locator("#back").click, "#strip .strip")
        assert board.tiles() == keys[:PAGE_SIZE]
        search = page.locator("#search textarea, #search input").first
        search.fill("AGE_00")
        board.after(lambda: search.press("Enter"), "#strip .strip")
        assert board.tiles() == [key for key in keys if "age_00" in key]
        assert "1 / 1 · 10 found" in page.locator("#count").inner_text()

        board.after(board.tile(2).click)
        page.get_by_label("choose the other").check()
        board.after(board.tile(7).click)
        assert "image_002" in board.titles()
        assert "image_007" in board.titles()
        board.click_patch(0, 0.3, 0.9)
        for teacher, maps, patch in (
            ("alpha", board.maps()[:3], (1, 3)),
            ("beta <b>", board.maps()[3:], (0, 2)),
        ):
            samples = [cache.find(key) for key in ("image_002", "image_007")]
            expected = expected_maps(cache, teacher, cache.index.rows(samples, 0).tolist(), 3, patch)
            for uri, picture in zip(maps[1:], expected, strict=True):
                assert np.abs(pixels(uri).astype(int) - picture).max() <= 2
        assert "beta <b>" in board.titles()
        assert "level 4 (block 3), random weights" in board.titles()
        assert page.locator("#headline").inner_text().endswith("complete")

        before = board.maps()
        board.click_patch(1, 0.9, 0.1)  # a map can be clicked as the photograph can
        after = board.maps()
        assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, False] * 2
        board.after(page.get_by_label("level 2").check)
        assert not set(board.maps()) & set(after)
        before = board.maps()
        board.choose("view", "view 1")
        assert not set(board.maps()) & set(before)
        board.choose("codec", "compare int4-hadamard")
        assert len(board.maps()) == 8
        assert_nothing_is_cut(page)
        board.choose("codec", "compare no codec")
        assert len(board.maps()) == 6

        both = board.maps()
        board.after(page.locator("#teachers").get_by_label("alpha").uncheck)
        assert board.maps() == both[3:]
        assert "alpha" not in board.titles()
        board.after(page.locator("#teachers").get_by_label("beta <b>").uncheck)
        assert board.maps() == []
        board.after(page.locator("#teachers").get_by_label("beta <b>").check)
        board.after(page.locator("#teachers").get_by_label("alpha").check)
        assert board.maps() == both
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]

        search.fill("no such key")
        board.after(lambda: search.press("Enter"), "#strip .strip")
        assert "No key holds this text." in page.locator("#strip").inner_text()
    assert browser.requests
    assert all(request.startswith(url) for request in browser.requests)


def test_a_student_beside_its_teacher(
    cache: FeatureCache,
    student: Student,
    browser: Browser,
) -> None:
    with serving(cache, student) as url, browser.page() as page:
        board = Board(page, url)
        assert "Student's error" in board.titles()
        assert "not distilled from this teacher" in board.titles()
        student_map, error_map = (pixels(uri) for uri in board.maps()[3:5])
        assert student_map.shape == error_map.shape == (4, 4, 3)
        assert "mean" in page.locator("#board figcaption", has_text="mean").first.inner_text()
        board.choose("codec", "compare int4-hadamard")
        assert len(board.maps()) == 5 + 1 + 3 + 1
        assert_nothing_is_cut(page)


def test_half_built_and_without_images(
    tmp_path: Path,
    images: Path,
    browser: Browser,
) -> None:
    half = make_cache(tmp_path / "cache", images, skip_shards=[1, 4])
    (tmp_path / "cache/teachers/alpha/codes/c/0/0/0/0/0").write_bytes(b"x")
    moved = FeatureCache.open(half.storage.url, images=str(make_images(tmp_path / "fewer", 3)))
    with serving(moved) as url, browser.page() as page:
        board = Board(page, url)
        said = page.locator("#headline em")
        said.wait_for()
        for words in (
            "not complete: alpha 3 of 5 shards, beta 3 of 5 shards",
            "1 broken: teachers/alpha/codes/c/0/0/0/0/0 has 1 bytes",
        ):
            assert words in said.inner_text()
        assert page.locator("#strip button", has_text="no image").count() == PAGE_SIZE - 3
        board.after(board.tile(4).click)
        assert "are not committed" in board.titles()
        board.after(board.tile(0).click)
        assert len(board.maps()) == 3  # beta's
        assert page.locator("#board > div figure > .missing", has_text="alpha").count() == 3
    empty = make_cache(tmp_path / "empty", images, skip_shards=range(5))
    assert "no shard is committed yet" in Explorer(empty).board(Explorer(empty).first())
    (tmp_path / "empty/samples.parquet").write_bytes(b"?")
    with pytest.raises(CacheError, match=r"samples\.parquet"):
        Explorer(FeatureCache.open(empty.storage.url))


def test_s3_is_read_by_ranges(
    images: Path,
    server: Server,  # noqa: F811
    browser: Browser,
) -> None:
    make_cache("s3://bucket/viewed", images, teachers=TEACHERS)
    server.answered.clear()
    with serving(FeatureCache.open("s3://bucket/viewed")) as url, browser.page() as page:
        board = Board(page, url)
        page.locator("#headline", has_text="complete").wait_for()  # every record was read for this
        before = len(server.answered)
        board.click_patch(0, 0.1, 0.1)
        assert len(server.answered) == before  # what is shown is at hand
        board.after(board.tile(3).click)
        assert len(board.maps()) == 6
    shards = [request for request in server.requests("GET") if "/c/" in request.path]
    assert shards
    assert all(request.range for request in shards)


class Client:
    """Asks the server as the page does, or as nobody should."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(trust_env=False, timeout=TIMEOUT_S)
        config = self.http.get(url + "config").json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.events = {
            (names.get(target), event): dependency["id"]
            for dependency in config["dependencies"]
            for target, event in dependency["targets"]
        }
        self.sessions = 0

    def send(self, part: str, event: str, data: list[Any], event_data: Any = None) -> dict[str, Any]:
        """What the event gave; `data` has None in the place of what the server keeps."""
        self.sessions += 1
        session = f"session{self.sessions}"
        body = {
            "fn_index": self.events[part, event],
            "data": data,
            "event_data": event_data,
            "session_hash": session,
        }
        text = json.dumps(body).replace('"HUGE"', "9" * 4000)
        joined = self.http.post(
            self.url + "gradio_api/queue/join", content=text, headers={"content-type": "application/json"}
        )
        assert joined.status_code == 200, joined.text
        with self.http.stream("GET", f"{self.url}gradio_api/queue/data?session_hash={session}") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    return {"success": message["success"], **message["output"]}
        raise AssertionError("the stream ended without an answer")


OURS = "This is not what the page sends."
PATCH, SAMPLE = ("board", "click"), ("strip", "click")
SAMPLE_DATA = ["choose the image", "", None, None]
NO_PLACES: list[Any] = [
    *(None, 3, "xy", [], {}, {"x": 0.5}, {"x": "0.5", "y": 0.5}, {"x": None, "y": 0}),
    *({"x": float("nan"), "y": 0.5}, {"x": 0, "y": float("inf")}, {"x": "HUGE", "y": 0}),
    *({"x": True, "y": 0.5}, {"x": [1], "y": {}}, {"x": 1e300, "y": 0}),
]
NO_SAMPLES: list[Any] = ["../../etc/passwd", None, "HUGE", float("nan"), 2**63, [0], True]
NO_OPTIONS: list[tuple[str, list[Any], str]] = [
    *(("level", [wrong, "0", "none", ["alpha"], None], "not in the list") for wrong in ("9", "-1", "../..")),
    *(("level", [wrong, "0", "none", ["alpha"], None], "") for wrong in NO_PLACES),
    ("view", ["0", "99", "none", ["alpha"], None], "not in the list"),
    ("view", ["0", ["0", "1"], "none", ["alpha"], None], OURS),
    ("codec", ["0", "0", "../../codec", ["alpha"], None], "not in the list"),
    ("codec", ["0", "0", None, ["alpha"], None], OURS),
    *(("teachers", ["0", "0", "none", wrong, None], OURS) for wrong in ("", None, 0, 7, 1.5, True, "alpha")),
    ("teachers", ["0", "0", "none", {}, None], OURS),
    ("teachers", ["0", "0", "none", {"alpha": 1}, None], OURS),
    ("teachers", ["0", "0", "none", ["gamma"], None], "not in the list"),
    ("teachers", ["0", "0", "none", ["../.."], None], "not in the list"),
    ("teachers", ["0", "0", "none", [{}], None], "not in the list"),
    ("teachers", ["0", "0", "none", "HUGE", None], OURS),
]


@pytest.mark.parametrize(
    ("target", "data", "event_data", "message"),
    [
        *((PATCH, [None], place, OURS) for place in NO_PLACES),
        *((SAMPLE, SAMPLE_DATA, {"sample": sample}, OURS) for sample in NO_SAMPLES),
        *((SAMPLE, SAMPLE_DATA, {"sample": n}, "There is no such sample.") for n in (-1, 14, 2**40, -0.5)),
        (SAMPLE, ["another role", *SAMPLE_DATA[1:]], {"sample": 0}, "not in the list"),
        *(((part, "input"), data, None, message) for part, data, message in NO_OPTIONS),
    ],
)
def test_hostile_parameters_are_refused(
    client: Client, target: tuple[str, str], data: list[Any], event_data: Any, message: str
) -> None:
    answer = client.send(*target, data, event_data)
    assert not answer["success"]
    assert message in (answer["error"] or "")
    assert "Traceback" not in json.dumps(answer)


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(url)


def test_strange_texts_are_searched_for(client: Client) -> None:
    for text in (None, 5, {"a": 1}, "x" * 5000, "\0", "' OR 1=1", ".*", "\ud800"):
        found = client.send("search", "submit", [text, None])
        assert found["success"], (text, found)
    assert client.send("search", "submit", [HOSTILE, None])["success"]


def test_a_place_at_or_beyond_the_edge_is_the_last_patch(client: Client) -> None:
    for x, y in ((1, 1), (-7, 50)):
        answer = client.send(*PATCH, [None], {"x": x, "y": y})
        assert answer["success"]
        assert answer["data"][1].count("img") > 6


def status(url: str, path: str, method: str = "GET", **headers: str) -> int:
    """As it is: a client of more sense would not send these paths."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_nothing_is_served_but_the_page(url: str, cache: FeatureCache) -> None:
    secret = Path(cache.storage.url) / "samples.parquet"
    for path in (
        *(f"/file={secret}", f"/gradio_api/file={secret}", f"/gradio_api/file%3D{secret}"),
        *("/gradio_api/file=/etc/passwd", "//gradio_api/file=/etc/passwd", "/static/../file=/etc/passwd"),
        *("/static/../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/routes.py", "/static//etc/passwd"),
        *("/assets/../../../../etc/passwd", "/assets/..%2f..%2f..%2froutes.py", "/assets//etc/passwd"),
        *("/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/stream/a", "/gradio_api/info"),
        *("/gradio_api/component_server", "/monitoring", "/docs", "/openapi.json", "/gradio_api/mcp/sse"),
        *("/gradio_api/call/load", "/gradio_api/run/predict", "/gradio_api/reset", "/gradio_api/cancel"),
        *(
            "/login",
            "/logout",
            "/config/",
            "/config%3Fx",
            "/theme.css/../config/x",
            "/custom_component/a/b/c",
            "/deep_link",
        ),
    ):
        assert status(url, path) in (403, 404), path
    assert status(url, "/gradio_api/upload", "POST", content_length="0") == 404
    assert status(url, "/gradio_api/queue/join", "POST", content_length="100000") == 413
    assert status(url, "/gradio_api/queue/join", "POST", transfer_encoding="chunked") == 411
    assert status(url, "/") == status(url, "/", "HEAD") == 200


@pytest.mark.parametrize("number", [99999, -1])
def test_an_event_that_is_not_there_is_refused(url: str, number: int) -> None:
    body = {"fn_index": number, "data": [], "session_hash": "nobody"}
    answer = httpx.post(url + "gradio_api/queue/join", json=body, trust_env=False, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.text) == (400, OURS)


def test_names_that_others_gave_this_server_are_refused(url: str) -> None:
    port = urlsplit(url).port
    assert status(url, "/", host="evil.example") == 400
    assert status(url, "/config", host=f"evil.example:{port}") == 400
    assert status(url, "/", host=f"localhost:{port}") == 200


def test_the_page_forbids_itself_the_world_outside(url: str) -> None:
    policy = httpx.get(url, trust_env=False).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert not re.search(r"https?:|\*", policy)


def test_no_port_to_be_had() -> None:
    with listen("127.0.0.1") as taken, pytest.raises(TeacherCacheError, match="cannot be served"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(TeacherCacheError, match="--server-name"):
        listen("192.0.2.1", 1)  # an address that is kept for documents


def test_the_command(cache: FeatureCache) -> None:
    """Behind a proxy that is not there: nothing but the browser asks this server, and it asks nobody."""
    command = [sys.executable, "-m", "teachercache.jobs.cli", "view", str(cache.storage.url)]
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **proxies}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    address = urlsplit(line.split()[0])
    assert address.hostname == "127.0.0.1"
    assert httpx.get(address.geturl(), trust_env=False, timeout=TIMEOUT_S).status_code == 200
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", address.port or 0), timeout=1).close()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors == ""
