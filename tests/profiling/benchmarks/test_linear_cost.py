"""The cost per token: every length gets the same work, and the figures say what they are named after. No timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hydra_ppo.profiling.benchmarks import linear_cost, linear_report
from hydra_ppo.profiling.benchmarks.attention_time import AttentionClock
from hydra_ppo.profiling.benchmarks.phases import PHASES

TINY = linear_cost.Sizes(
    hidden=16, intermediate=24, layers=1, heads=2, kv_heads=1, rank=2, tokens=32, pass_tokens=16, decoded=2
)


def cell(length: int, vocabulary: int, microseconds: float, attention: float, per_token: float) -> linear_report.Cell:
    return linear_report.Cell(
        length,
        vocabulary,
        dict.fromkeys(PHASES, microseconds),
        dict.fromkeys(PHASES, attention),
        dict.fromkeys(PHASES, 1000),
        dict.fromkeys(PHASES, per_token),
        static_bytes=5,
        disturbed=0,
    )


CELLS = [cell(4, 50, 10.0, 2.0, 90.0), cell(8, 50, 14.0, 5.0, 100.0), cell(4, 99, 30.0, 0.0, 108.0)]


def test_a_cell_by_hand():
    model = linear_cost.make_model(50, 8, TINY)
    subject = linear_cost.Subject(model, 8, TINY)
    clocks = [AttentionClock() for _ in range(3)]
    for clock, seconds in zip(clocks, (0.0032, 0.0064, 0.32), strict=True):
        clock.seconds = dict.fromkeys(PHASES, seconds)
        clock.attention = dict.fromkeys(PHASES, seconds / 4)
    found = subject.cell(clocks, {"rollout": 36, "score": 180, "update": 360}, 7, disturbed=1)
    assert found.microseconds_per_token["update"] == pytest.approx(200)  # 6.4 ms for 32 tokens
    assert found.without_attention("score") == pytest.approx(150)
    # Prompts of 1 token: 2 x 9 tokens are decoded together, and 2 rows of 8 + 1 make a pass.
    assert found.peak_bytes_per_token == {"rollout": 2.0, "score": 10.0, "update": 20.0}


def test_only_the_rows_get_longer():
    """Steps, passes and optimizer steps handle the same number of response tokens at every length."""
    model = linear_cost.make_model(50, 8, TINY)
    counted = []
    for length in (4, 8):
        subject = linear_cost.Subject(model, length, TINY)
        steps: list[str] = []
        announce = subject.trainer.on_phase
        subject.trainer.on_phase = lambda phase, steps=steps, announce=announce: (steps.append(phase), announce(phase))
        clock = subject.time()
        counted.append({phase: steps.count(phase) for phase in steps})
        assert all(clock.seconds[phase] > clock.attention[phase] > 0 for phase in PHASES)
        settings = subject.trainer.config
        assert settings.rollout.batch_size * length == TINY.tokens
        assert settings.rollout.score_batch_size * length == settings.microbatch_size * length == TINY.pass_tokens
    assert counted[0] == counted[1] == {"rollout": 1, "score": 1, "update-actor": 2, "update-critic": 2, "optimizer": 2}


def test_static_bytes_and_peaks():
    model = linear_cost.make_model(50, 8, TINY)
    subject = linear_cost.Subject(model, 8, TINY)
    peaks, static = subject.weigh()
    moments = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 4 * (sum(p.numel() for p in model.parameters()) + moments)
    assert held <= static < 1.05 * held + 1000  # buffers and step counts besides
    # More than the input and output of each linear layer of a pass, 18 tokens of 16 and 24 numbers.
    assert peaks["update"] > 18 * 4 * (4 * 16 + 3 * 24)
    assert all(peaks[phase] > 0 for phase in PHASES)


def test_spreads_by_hand():
    assert linear_report.spread([10.0, 8.0, 9.0]) == pytest.approx(0.25)
    found = linear_report.spreads(CELLS)
    assert found["update time, vocabulary 50"] == pytest.approx(0.4)  # 14 over 10
    assert found["update time without attention, vocabulary 50"] == pytest.approx(0.125)  # 9 over 8
    assert found["score time, vocabulary 99"] == 0.0
    assert found["update peak"] == pytest.approx(0.2)  # 108 over 90, across vocabularies
    assert "rollout peak" not in found


def test_linear_table_and_picture():
    shown, verdicts = linear_report.tables(CELLS, "")
    cells = [list(column.cells) for column in shown.columns]
    assert cells[:3] == [["50", "50", "99"], ["4", "8", "4"], ["10 (8)", "14 (9)", "30 (30)"]]
    names, *rest = (list(column.cells) for column in verdicts.columns)
    found = dict(zip(names, zip(*rest, strict=True), strict=True))
    assert found["update time, vocabulary 50"] == ("+40%", "")
    assert found["update time without attention, vocabulary 50"] == ("+12%", "flat")
    panels = linear_report.figure(CELLS).axes
    assert [axes.get_title(loc="left") for axes in panels[:3]] == list(PHASES)
    total, rest, *_ = panels[0].get_lines()
    assert (list(total.get_ydata()), list(rest.get_ydata())) == ([10.0, 14.0], [8.0, 9.0])
    assert list(panels[3].get_lines()[0].get_ydata()) == [90.0 / 1024, 100.0 / 1024]


def shrunk(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lengths, vocabularies, rounds, sizes, say: call(lengths, vocabularies, rounds, TINY, say)


def test_linear_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linear_cost, "measure", shrunk(linear_cost.measure))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    output = tmp_path / "new" / "linear.json"
    arguments = ["--lengths", "4", "8", "--vocabularies", "50", "--rounds", "1", "--output", str(output)]
    assert linear_cost.main(arguments) == 0
    found = json.loads(output.read_text())
    assert [(c["response_tokens"], c["vocabulary"]) for c in found["cells"]] == [(4, 50), (8, 50)]
    assert found["spreads"].keys() == linear_report.spreads(CELLS[:2]).keys()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "vocabulary 50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "rounds=0 must be at least 1"),
        (["--lengths", "100"], "length=100 does not cut 4096 tokens into passes of 1024"),
    ],
)
def test_linear_bad_input(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert linear_cost.main([*arguments, "--output", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
