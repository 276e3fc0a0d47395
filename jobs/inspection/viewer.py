"""The page of `teachercache view`, served by Gradio on loopback.

The server gives what the page needs and nothing else: no file, no upload, no proxy. Nothing that a browser
sends names a file, and the policy sent with the page forbids the browser to ask anyone else.
"""

import math
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from teachercache.jobs.inspection.explorer import Explorer, Selection
from teachercache.jobs.inspection.page import html
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import codec_names
from teachercache.pipeline.errors import CacheError, TeacherCacheError, extra
from teachercache.student.models.student import Student

with extra("view"):
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response

STYLE, _PICK = (Path(__file__).with_name(name).read_text() for name in ("viewer.css", "viewer.js"))
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FIRST_PORT, _PORTS = 7860, 100
_MAX_SEARCH = 256
_MAX_DIGITS = 5  # of the length of a request's body; the page sends less than 1 kB
_LARGEST = 2**53  # what a browser can count to; NaN is not below it either
_BELOW_ONE = math.nextafter(1, 0)
_BARE: dict[str, Any] = {"show_label": False, "container": False}
_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
)
_SERVED = ("/assets/", "/static/", "/gradio_api/heartbeat/")
_SERVED_EXACTLY = {
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *("/gradio_api/startup-events", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/app_id"),
}
_THIS, _OTHER, _NO_CODEC = "choose the image", "choose the other", "none"
_NOT_OURS = "This is not what the page sends."


def serve(
    cache: FeatureCache,
    *,
    student: Student | None = None,
    server_name: str = "127.0.0.1",
    port: int | None = None,
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until interrupted. `on_ready` is given the address of the page.

    `port`: None takes the first free one from 7860 on. Raises `CacheError` for a cache that cannot be shown,
    `TeacherCacheError` where nothing can listen at this address.
    """
    with listen(server_name, port) as listener:
        server = make_server(Explorer(cache, student), server_name)
        host, bound_port = listener.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{bound_port}/")
        server.run(sockets=[listener])


def listen(server_name: str, port: int | None = None) -> socket.socket:
    """A socket that listens, at the first free port. Raises `TeacherCacheError` where there is none."""
    ports = range(_FIRST_PORT, _FIRST_PORT + _PORTS) if port is None else [port]
    family = socket.AF_INET6 if ":" in server_name else socket.AF_INET
    problem: OSError | None = None
    for candidate in ports:
        try:
            return socket.create_server((server_name, candidate), family=family)
        except OSError as error:
            problem = error
    raise TeacherCacheError(
        "The page cannot be served at this address.",
        got=f"{server_name}, port {port or f'{ports[0]} … {ports[-1]}'}: {problem}",
        expected="an address of this machine, and a free port",
        do="choose others with --server-name and --port",
    )


def make_server(explorer: Explorer, server_name: str) -> uvicorn.Server:
    guards = [Middleware(BaseHTTPMiddleware, dispatch=_only_what_is_needed)]
    if server_name in _LOOPBACK:  # a page elsewhere must not reach this server through a name of its own
        guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK)))
    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    no_such_event = {KeyError: lambda *_: PlainTextResponse(_NOT_OURS, 400)}
    app = gr.mount_gradio_app(
        FastAPI(**closed, middleware=guards),
        build_page(explorer),
        path="/",
        app_kwargs={**closed, "exception_handlers": no_such_event},
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
        pwa=False,
        footer_links=[],
        run_history=False,
        css=STYLE,
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))


async def _only_what_is_needed(request: Request, answer: RequestResponseEndpoint) -> Response:
    """404 for every path that the page does not need, and a policy that keeps the page to this server."""
    path, nbytes = request.scope["path"], request.headers.get("content-length", "")  # as it will be routed
    if path not in _SERVED_EXACTLY and not path.startswith(_SERVED):
        return PlainTextResponse("not found", 404)
    if request.method not in ("GET", "HEAD"):
        if not nbytes.isdigit():
            return PlainTextResponse("the length of the body is missing", 411)
        if len(nbytes) > _MAX_DIGITS:
            return PlainTextResponse("more than the page ever sends", 413)
    response = await answer(request)
    response.headers["content-security-policy"] = _POLICY
    return response


def build_page(explorer: Explorer) -> gr.Blocks:
    """The page. What a session looks at is kept on the server; an event names one change of it."""
    cache = explorer.cache
    first = explorer.first()
    with gr.Blocks(title="teachercache view", analytics_enabled=False) as blocks:
        headline = gr.HTML(_headline(cache), elem_id="headline", js_on_load=None)
        selection, page = gr.State(first), gr.State(0)
        with gr.Row(elem_id="find"):
            hint = "Search in the keys, then Enter"
            text = gr.Textbox(label=hint, placeholder=hint, elem_id="search", **_BARE)
            back = gr.Button("‹ back", elem_id="back", size="sm")
            count = gr.HTML(elem_id="count", js_on_load=None)
            forward = gr.Button("more ›", elem_id="forward", size="sm")
            role = gr.Radio([_THIS, _OTHER], value=_THIS, label="A click", elem_id="role", **_BARE)
        strip = gr.HTML(elem_id="strip", js_on_load=_PICK)
        with gr.Row(elem_id="options"):
            levels = [(f"level {n + 1}", str(n)) for n in range(explorer.num_levels)]
            level = gr.Radio(levels, value=str(first.level), label="Level", elem_id="level", **_BARE)
            views = [(f"view {n}", str(n)) for n in range(cache.num_views)]
            view = gr.Dropdown(views, value=str(first.view), label="View", elem_id="view", **_BARE)
            codecs = [("compare no codec", _NO_CODEC), *((f"compare {name}", name) for name in codec_names())]
            codec = gr.Dropdown(codecs, value=_NO_CODEC, label="Codec", elem_id="codec", **_BARE)
        names = list(cache.teachers)
        teachers = gr.CheckboxGroup(
            names, value=names, label="Teachers", elem_id="teachers", visible=len(names) > 1, **_BARE
        )
        teachers.preprocess = _list_only(teachers.preprocess)  # type: ignore[method-assign, assignment]
        board = gr.HTML(elem_id="board", js_on_load=_PICK)

        def list_samples(text: str | None, selection: Selection, page: int = 0) -> tuple[int, str, str]:
            half = (text or "")[:_MAX_SEARCH].encode(errors="replace")  # browsers may send half a character
            samples, page, words = explorer.search(half.decode(), page)
            return page, words, explorer.strip(samples, selection)

        def turn(step: int) -> Callable[[str, Selection, int], tuple[int, str, str]]:
            return lambda text, selection, page: list_samples(text, selection, page + step)

        def draw(chosen: Selection) -> str:
            try:
                return explorer.board(chosen)
            except CacheError as error:
                raise gr.Error(error.problem) from error

        def pick_sample(
            event: gr.EventData, role: str, text: str, selection: Selection, page: int
        ) -> tuple[Selection, str, str]:
            (number,) = _numbers(event, "sample")
            if not 0 <= number < cache.num_samples:
                raise gr.Error("There is no such sample.")
            sample = int(number)
            chosen = replace(selection, sample=sample) if role == _THIS else replace(selection, other=sample)
            return chosen, list_samples(text, chosen, page)[2], draw(chosen)

        def pick_patch(event: gr.EventData, selection: Selection) -> tuple[Selection, str]:
            x, y = (min(max(value, 0.0), _BELOW_ONE) for value in _numbers(event, "x", "y"))
            chosen = replace(selection, patch=(x, y))
            return chosen, draw(chosen)

        def set_options(
            level: object, view: object, codec: object, teachers: list[str], selection: Selection
        ) -> tuple[Selection, str]:
            if not (isinstance(level, str) and isinstance(view, str) and isinstance(codec, str)):
                raise gr.Error(_NOT_OURS)
            chosen = replace(
                selection,
                level=int(level),
                view=int(view),
                codec=None if codec == _NO_CODEC else codec,
                teachers=tuple(name for name in names if name in teachers),
            )
            return chosen, draw(chosen)

        listed, found = [text, selection, page], [page, count, strip]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        loud: dict[str, Any] = {"api_visibility": "private", "show_progress_on": board}
        # One after another, as they were asked for: each starts from what the one before it left.
        listing: dict[str, Any] = quiet | {"concurrency_id": "listing"}
        drawing: dict[str, Any] = {"concurrency_id": "drawing"}
        blocks.load(list_samples, listed, found, **listing)
        blocks.load(draw, selection, board, **loud)
        blocks.load(lambda: _headline(cache, explorer.state), None, headline, **quiet)
        text.submit(list_samples, [text, selection], found, **listing)
        back.click(turn(-1), listed, found, **listing)
        forward.click(turn(1), listed, found, **listing)
        strip.click(pick_sample, [role, *listed], [selection, strip, board], **loud, **drawing)
        board.click(pick_patch, selection, [selection, board], **quiet, **drawing)
        for option in (level, view, codec, teachers):
            given = [level, view, codec, teachers, selection]
            option.input(set_options, given, [selection, board], **loud, **drawing)
    return blocks


def _list_only(preprocess: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """Gradio would go through whatever a browser sends."""

    def checked(payload: object) -> list[Any]:
        if not isinstance(payload, list):
            raise gr.Error(_NOT_OURS)
        return preprocess(payload)

    return checked


def _numbers(event: gr.EventData, *names: str) -> list[float]:
    """Finite numbers that the browser sent with an event."""
    try:
        values = [getattr(event, name) for name in names]
    except (AttributeError, TypeError):
        values = [None]
    if not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in values):
        raise gr.Error(_NOT_OURS)
    return values


def _headline(cache: FeatureCache, state: list[str] | None = None) -> str:
    """`state`: what is missing or broken, once that is known."""
    return str(html.headline(cache.storage.url, cache.num_samples, cache.spec.random_weights, state))
