"""A real headless Chromium for tests, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_LAPTOP = {"width": 1280, "height": 720}  # what 13 inches leave for a page


class Browser:
    """`requests` of the last page, those that stay inside the browser (data:, blob:) left out."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self.requests: list[str] = []

    @contextmanager
    def page(self, scheme: str = "light") -> Iterator[Any]:
        """A fresh page. Fails the test for anything that the page wrote to its console, or raised."""
        complaints: list[str] = []
        self.requests = []
        page = self._chromium.new_page(viewport=_LAPTOP, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        try:
            yield page
        finally:
            page.close()
        assert not complaints, complaints

    def _note(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.requests.append(url)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium and no google-chrome here; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield Browser(chromium)
        chromium.close()
