"""The pages in a real Chromium: nothing runs that should not, nothing is cut, nothing is asked of the network."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import pytest

from hydra_ppo.profiling.reporting.html import write_html
from hydra_ppo.report.live import open_server
from hydra_ppo.report.page import write_report
from tests.pages import HOSTILE, write_run
from tests.profiling.reporting.test_reports import full, hydra, record

pytestmark = pytest.mark.browser

LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Write a page of each kind."""
    folder = tmp_path_factory.mktemp("a 'folder' <b>")
    one, other = write_run(folder / "one"), write_run(folder / "other", lift=-0.5, ppo_epochs=2)
    return {
        "run": write_report([one], folder / "run.html"),
        "runs": write_report([one, other], folder / "runs.html"),
        "memory": write_html(record(full(), hydra(method="hydra with a long name")), folder / "memory.html"),
    }


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
@pytest.mark.parametrize("kind", ["run", "runs", "memory"])
def test_a_page_fits_and_asks_for_nothing(opened, shot, pages, kind, width, scheme):
    page = opened(pages[kind].as_uri(), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # What is wider than the page scrolls inside itself, and nothing else reaches over its edge.
    over = page.evaluate(
        """[...document.body.querySelectorAll("*")].filter(item => !item.closest("svg") && !item.closest(".scroll, .command")
        && item.getBoundingClientRect().right > innerWidth + 0.5).map(item => item.outerHTML.slice(0, 80))"""
    )
    assert over == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part < 64)")
    assert dark == (scheme == "dark")
    assert opened.asked == [pages[kind].as_uri()]
    shot(page, f"{kind}-{width}-{scheme}-top")
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    shot(page, f"{kind}-{width}-{scheme}-middle")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    shot(page, f"{kind}-{width}-{scheme}-end", 1600)


def test_every_picture_says_in_words_what_it_shows(opened, pages):
    for kind in ("runs", "memory"):
        page = opened(pages[kind].as_uri())
        silent = page.evaluate(
            """[...document.querySelectorAll("svg[role=img], img")].filter(
            item => !(item.alt || (item.querySelector("title") || {}).textContent)).length"""
        )
        assert silent == 0
        assert page.evaluate('document.querySelectorAll("svg[role=img], img").length') >= 2


def test_a_wide_table_scrolls_inside_itself(opened, pages):
    page = opened(pages["memory"].as_uri(), 390)
    moved = page.evaluate(
        """[...document.querySelectorAll(".scroll")].map(item => { item.scrollLeft = 1e6;
        return [item.scrollWidth > item.clientWidth, item.scrollLeft > 0]; })"""
    )
    assert any(wide for wide, _ in moved)
    assert all(scrolled == wide for wide, scrolled in moved)


def test_what_a_model_writes_is_shown_and_does_not_run(opened, pages):
    page = opened(pages["run"].as_uri())
    page.mouse.move(600, 400)
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate('document.querySelectorAll("main img, main iframe, main style").length') == 0
    texts = page.locator(".sample").all_inner_texts()
    for text in HOSTILE[:5]:
        assert any(text in shown for shown in texts), text
    assert any("[U+202E]gnihton[U+202C] [U+0000][U+001B][31m [U+2028] [U+D800] ]]> <!--" in shown for shown in texts)


def test_the_filter(opened, pages):
    page = opened(pages["run"].as_uri())
    shown = page.locator(".sample:visible")
    assert shown.count() == len(HOSTILE)
    page.check("#changed")
    assert shown.count() == len(HOSTILE) - 1  # the answer to prompt 2 stays as it was
    page.fill("#find", "ANSWER 4")
    assert shown.count() == 1
    assert page.inner_text("#count") == f"1 of {len(HOSTILE)}"
    page.fill("#find", "")
    page.uncheck("#changed")
    page.select_option("#order", "-1")  # row r gained r
    assert [text.split()[1] for text in shown.locator(".prompt p").all_inner_texts()] == ["5", "4", "3", "2", "1", "0"]
    page.select_option("#order", "")
    assert [text.split()[1] for text in shown.locator(".prompt p").all_inner_texts()] == ["0", "1", "2", "3", "4", "5"]


def test_a_chart_tells_the_value_under_the_pointer_and_by_the_keyboard(opened, pages):
    page = opened(pages["run"].as_uri())
    chart = page.locator(".chart", has_text="KL from the reference")
    box = chart.locator("svg[role=img]").bounding_box()
    assert chart.locator(".read").inner_text() == "step 12: rollouts 20, held-out 18"
    at = box["x"] + box["width"] * (46 + (360 - 46 - 10) * 4 / 12) / 360  # step 4 of 0 to 12
    page.mouse.move(at, box["y"] + box["height"] / 2)
    assert chart.locator(".read").inner_text() == "step 4: rollouts 6.667, held-out 6"
    page.mouse.move(1, 1)
    assert chart.locator(".read").inner_text() == "step 12: rollouts 20, held-out 18"
    chart.locator("svg[role=img]").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert chart.locator(".read").inner_text() == "step 11: rollouts 18.33"


def test_a_served_page_renews_itself_and_keeps_what_its_reader_does(opened, tmp_path, monkeypatch):
    from playwright.sync_api import expect

    monkeypatch.setattr("hydra_ppo.report.live.EVERY", 0.1)
    folder = write_run(tmp_path / "run", finished=False)
    with open_server([folder], 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/"
            page = opened(address)
            expect(page.locator("#live")).to_contain_text("Live: looked at")
            page.fill("#find", "answer 4")
            page.evaluate("window.here = 1; scrollTo(0, 700)")
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": 13, "objective/scores": 7.5}) + '\n{"step": 14, "objec')
            with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                row = {"step": 13, "held_out": True, "prompt": "new", "response": "answer 4 too", "score": 1.0}
                file.write(json.dumps(row) + "\n")
            expect(page.locator(".chart .read").first).to_have_text("step 13: rollouts 7.5")
            expect(page.locator("#count")).to_have_text("2 of 7")
            assert page.evaluate("[window.here, scrollY]") == [1, 700]
            assert page.input_value("#find") == "answer 4"
            assert {url.removeprefix(address) for url in opened.asked} == {"", "parts"}
        finally:
            server.shutdown()
            thread.join()
        server.server_close()
        expect(page.locator("#live")).to_contain_text("Not served any more")
    # The browser itself notes that nobody answers; nothing else was complained of.
    assert all("ERR_CONNECTION_REFUSED" in line for line in opened.complaints)
    opened.complaints.clear()
