"""Lines of progress, where output is no terminal."""

import io

from rich.console import Console

from hydra_ppo.runs.progress import Lines, shown_progress


def test_lines_by_hand():
    """Ten steps of five seconds each, of which a run that goes on had done two: a line when fifteen seconds are gone."""
    now, said = 100.0, []
    lines = Lines(12, "PPO", said.append, clock=lambda: now)
    lines(2, "")
    for step in range(10):
        now += 5
        lines(1, f"score {step}")
    assert said == [
        "PPO 5 of 12, 0:15 gone, about 0:35 left; score 2",
        "PPO 8 of 12, 0:30 gone, about 0:20 left; score 5",
        "PPO 11 of 12, 0:45 gone, about 0:05 left; score 8",
    ]


def test_hours():
    now, said = 0.0, []
    lines = Lines(3, "SFT", said.append, clock=lambda: now)
    now = 3700.0
    lines(1, "loss 1")
    assert said == ["SFT 1 of 3, 1:01:40 gone, about 2:03:20 left; loss 1"]


def test_a_terminal_gets_a_bar_and_a_file_does_not():
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with shown_progress(console, 2, "SFT") as advance:
            advance(1, "loss 1")
        assert bool(console.file.getvalue()) == terminal
