"""A real Chromium, headless, driven by Playwright: Debian's `chromium` and the package `playwright` (`make test-browser`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(__file__).parents[2] / "runs" / "browser"
REQUIRED = "HYDRA_TEST_BROWSER"
"""Where it is set, what is missing fails the tests instead of skipping them."""


def missing(what: str) -> None:
    """Skip, or fail where the tests were asked for."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what}; make test-browser needs it.")
    pytest.skip(what)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser for all tests."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("no Chromium: apt-get install chromium, or name one in CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no package playwright: pip install 'hydra-ppo[browser]'")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.hookimpl(tryfirst=True)  # before -m is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs it."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)
