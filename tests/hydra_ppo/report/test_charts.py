"""Pictures as SVG: round ticks, places by hand, and nothing that a browser would take for markup."""

import re
from xml.etree import ElementTree

import pytest

from hydra_ppo.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    bar_chart,
    line_chart,
    number,
    ticks,
    whole_ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0.31, 0.92, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.04, 0.0, [-0.04, -0.03, -0.02, -0.01, 0.0]),
        (0, 9, [0, 2.5, 5, 7.5, 10]),
        (1e6, 1.9e6, [1e6, 1.25e6, 1.5e6, 1.75e6, 2e6]),
        (3, 3, [2.6, 2.8, 3.0, 3.2, 3.4]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose_what_is_drawn(low, high, expected):
    assert ticks(low, high, 4) == pytest.approx(expected)


def test_steps_are_whole():
    assert whole_ticks(14, 6) == [0, 5, 10]
    assert whole_ticks(3, 6) == [0, 1, 2, 3]
    assert whole_ticks(938, 6) == [0, 200, 400, 600, 800]
    assert whole_ticks(1.0, 6) == [0, 1]


def test_numbers_are_short():
    found = [number(value) for value in (0, 0.25, 1500, 1234567, 2.1e-5, -0.5, 12.3456, 999.96)]
    assert found == ["0", "0.25", "1,500", "1.23e+06", "2.1e-05", "-0.5", "12.35", "1,000"]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_points_are_where_they_should_be():
    """Values from 0 to 4, steps from 0 to 10: the corners of the area, and its middle."""
    chart = Chart("Score", "mean", [Line("rollout", [0, 5, 10], [0, 2, 4])], marks=[5])
    svg = parsed(line_chart(chart))
    line = svg.find("polyline").get("points")
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    assert line == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f} {middle[0]:.1f},{middle[1]:.1f} {WIDTH - RIGHT:.1f},{TOP:.1f}"
    assert [mark.get("x1") for mark in svg.findall("line[@class='mark']")] == [f"{middle[0]:.1f}"]
    assert svg.get("aria-label") == "Score, mean: rollout goes from 0 at step 0 to 4 at step 10"
    assert [dot.find("title").text for dot in svg.findall("circle")] == [
        f"rollout: {v} at step {s}" for s, v in ((0, 0), (5, 2), (10, 4))
    ]


def test_one_point_and_thousands_of_points():
    one = parsed(line_chart(Chart("KL", "nats", [Line("a", [3], [7.0])])))
    assert len(one.findall("circle")) == 1
    many = parsed(line_chart(Chart("KL", "nats", [Line("a", range(5000), [float(i % 7) for i in range(5000)])])))
    assert len(many.find("polyline").get("points").split()) == 5000
    assert len(many.findall("circle")) <= 120


def test_labels_are_text_and_never_markup():
    svg = line_chart(Chart("KL", "nats", [Line("<b>\"&'", [0, 1], [0, 1])]))
    assert "<b>" not in svg
    assert parsed(svg).find("circle/title").text.startswith("<b>\"&'")
    bars = bar_chart("<i>", "MiB", [("<script>", 1.0)], ("<card>", 2.0))
    assert not re.search("<(i|script|card)>", bars)
    assert parsed(bars).get("aria-label") == "<i>, MiB: <script> 1; <card> 2"


def test_bars_are_as_long_as_their_values_beside_the_card():
    svg = parsed(bar_chart("Memory", "GiB", [("rollout", 2.0), ("update", 4.0)], ("RTX", 8.0)))
    first, second = (float(bar.get("width")) for bar in svg.findall("rect"))
    card = float(svg.find("line").get("x1")) - 110
    assert (second / first, card / second) == (pytest.approx(2), pytest.approx(2))
