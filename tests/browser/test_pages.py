"""Pages in a real browser: no error, no request, nothing cut, in both widths and schemes; pictures stay in runs/browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hydra_ppo.profiling.reporting.html import write_html
from hydra_ppo.report.gathered import gather_all
from hydra_ppo.report.live import Server
from hydra_ppo.report.page import content, report_of, write_report
from tests.browser.conftest import SCREENSHOTS
from tests.hydra_ppo.report.runs import logged, write_run
from tests.profiling.reporting.test_reports import full, hydra, record

WIDTHS = {"desk": 1280, "phone": 390}
SCHEMES = ("light", "dark")


@contextmanager
def opened(browser: Any, address: str, width: int, scheme: str, own: str = "file:") -> Iterator[Any]:
    """Open a page; at the end, fail where the console had an error, or anything but the page itself was asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((own, "data:")) else wrong.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert not wrong


def cut_off(page: Any) -> list[str]:
    """Return what is wider than the page: the body itself, and elements that lie outside of it and in nothing that scrolls."""
    return page.evaluate("""() => {
        const width = document.documentElement.clientWidth, found = [];
        if (document.documentElement.scrollWidth > width) found.push('body ' + document.documentElement.scrollWidth);
        for (const one of document.querySelectorAll('body *')) {
            if (one.closest('.scroll, pre, svg')) continue;
            if (one.getBoundingClientRect().right > width + 0.5) found.push(one.tagName + '.' + one.className);
        }
        return found;
    }""")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Write each kind of page there is."""
    folder = tmp_path_factory.mktemp("pages")
    first = write_run(folder / "runs" / "a-run-with-a-name-that-is-long-and-has-no-place-to-break-it-on-a-phone", steps=40)
    second = write_run(folder / "runs" / "second", steps=25, seed=3, device=("RTX 4090", 24 * 2**30))
    return {
        "run": write_report([first], folder / "run.html"),
        "two": write_report([first, second], folder / "two.html"),
        "memory": write_html(record(hydra(), full()), folder / "memory.html"),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "two", "memory"])
def test_a_page_is_whole(chromium, pages, name, width, scheme):
    with opened(chromium, pages[name].as_uri(), WIDTHS[width], scheme) as page:
        assert cut_off(page) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        for picture in page.query_selector_all("svg, img"):
            assert picture.get_attribute("aria-label") or picture.get_attribute("alt")
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)


def test_a_table_that_is_wider_scrolls_inside_itself(chromium, pages):
    with opened(chromium, pages["memory"].as_uri(), WIDTHS["phone"], "light") as page:
        wider = page.evaluate("""() => Array.from(document.querySelectorAll('.scroll'))
            .filter(one => one.scrollWidth > one.clientWidth)
            .map(one => { one.scrollLeft = 1e6; const last = one.querySelector('tr:last-child > :last-child');
                return last === null || last.getBoundingClientRect().right <= one.getBoundingClientRect().right + 1; })""")
        assert wider
        assert all(wider)  # the last column can be reached


def test_samples_can_be_sifted_and_what_they_say_does_not_run(chromium, pages):
    with opened(chromium, pages["run"].as_uri(), WIDTHS["desk"], "light") as page:
        assert page.title().startswith("hydra-ppo: ")  # the hostile sample would have changed it
        assert page.query_selector_all("img") == []
        shown = lambda: [box.inner_text().split("\n")[0] for box in page.query_selector_all(".sample") if box.is_visible()]  # noqa: E731
        assert shown() == [f"prompt {i}" for i in range(5)]
        page.check(".changed")
        assert shown() == [f"prompt {i}" for i in range(4)]  # the last was left as it was
        page.select_option(".order", "up")
        assert shown() == ["prompt 3", "prompt 2", "prompt 1", "prompt 0"]  # gains are 1 - 1.1 i
        page.fill(".find", "AFTER 2")
        assert shown() == ["prompt 2"]
        assert page.inner_text(".count") == "1 of 5"


def test_a_live_page_refreshes_itself_and_keeps_what_the_reader_chose(chromium, tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    inside = lambda: content(gather_all([run]))  # noqa: E731
    with Server(0, lambda: report_of([run], is_live=True), inside) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with opened(chromium, server.address, WIDTHS["desk"], "light", own=server.address) as page:
                page.check(".changed")
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(f'{{"step": 99, "objective/scores": {logged(13)["objective/scores"]}}}\n')
                page.get_by_text("interrupted, step 99").wait_for(timeout=20000)
                assert page.is_checked(".changed")
                assert len([box for box in page.query_selector_all(".sample") if box.is_visible()]) == 4
        finally:
            server.shutdown()
            thread.join()
