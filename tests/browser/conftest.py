"""A headless Chromium: the system's own, driven by Playwright's package, whose browsers are not needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WANTED = os.environ.get("HYDRA_TEST_BROWSER", "") not in ("", "0")
SHOTS = Path(__file__).parents[2] / "runs" / "browser"


def missing() -> str | None:
    """Return what is to be installed before a browser can be driven; None where all is there."""
    if importlib.util.find_spec("playwright") is None:
        return "the package playwright is not installed; run pip install 'hydra-ppo[test]'"
    if chromium() is None:
        return "there is no Chromium; run apt-get install chromium, or set HYDRA_CHROMIUM to its path"
    return None


def chromium() -> str | None:
    """Return the path of a Chromium of this machine."""
    return os.environ.get("HYDRA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the browser; skip where there is none, and fail where it was asked for.

    Of a module: while it runs, so does an event loop of Playwright's in this thread, and tests of loops fail beside it.
    """
    if (what := missing()) is not None:
        pytest.fail(what) if WANTED else pytest.skip(what)
    from playwright.sync_api import sync_playwright

    flags = ["--disable-dev-shm-usage", "--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open pages, and check at the end that none complained, nor asked for anything but itself."""
    contexts, complaints, asked = [], [], []

    def open_page(address: str, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    open_page.asked, open_page.complaints = asked, complaints  # type: ignore[attr-defined]
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def shot() -> Callable[..., None]:
    """Keep a screenshot under runs/browser, from where the page is scrolled to."""

    def take(page: Any, name: str, height: int = 2400) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        size = page.viewport_size
        page.set_viewport_size({"width": size["width"], "height": height})
        page.screenshot(path=SHOTS / f"{name}.png")
        page.set_viewport_size(size)

    return take
