"""Plots of a run: which are drawn, from which metrics, and that unmeasured values stay out."""

import json
from pathlib import Path

import pytest

from hydra_ppo.errors import DataError
from hydra_ppo.runs import plots, watch_plots
from hydra_ppo.runs.plots import LINE_PLOTS, PHASES, plot_run, read_metrics

PPO_PLOTS = ["kl.png", "length.png", "memory.png", "reward.png"]
SFT_PLOTS = ["loss.png", "pair_accuracy.png", "perplexity.png"]


def write_metrics(folder: Path, records: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **r}) + "\n" for i, r in enumerate(records, 1)))
    return folder


def ppo_records(steps: int) -> list[dict]:
    return [
        {
            "objective/scores": i / 10,
            "objective/rlhf_reward": i / 10 - 0.1,
            "objective/kl": i / 5,
            "rollout/response_length": 50 + i,
            "eval/scores": i / 10 if i % 10 == 0 else None,
            **{f"memory/{phase}_peak_bytes": 2**20 * 100 if i < 2 else None for phase in PHASES},
        }
        for i in range(steps)
    ]


def sft_records(steps: int) -> list[dict]:
    return [
        {"loss/total": 2.0 / (i + 1), "loss/sft": 1.9 / (i + 1), "loss/reward": 0.1, "train/reward_accuracy": 0.5}
        | ({"eval/perplexity": 9.0, "eval/reward_accuracy": 0.6} if i % 5 == 0 else {})
        for i in range(steps)
    ]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (ppo_records(30), PPO_PLOTS),
        (sft_records(30), SFT_PLOTS),
        (ppo_records(1), PPO_PLOTS),
        ([{"objective/kl": 0.0}], ["kl.png"]),
        ([{"objective/kl": None}, {"memory/rollout_peak_bytes": None, "lr": 0.1}], []),
        ([], []),
    ],
)
def test_which_plots_are_drawn(records, expected, tmp_path):
    written = plot_run(write_metrics(tmp_path, records))
    assert sorted(path.name for path in written) == expected
    assert all(path.parent == tmp_path / "plots" and path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert (tmp_path / "plots").exists() == bool(expected)


def test_a_folder_without_metrics_has_no_plots(tmp_path):
    assert plot_run(tmp_path) == []


def test_null_values_are_skipped_and_memory_is_in_mib(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_draw_lines", lambda path, plot, series: drawn.setdefault(path.name, series) and path)
    monkeypatch.setattr(plots, "_draw_memory", lambda path, peaks: drawn.setdefault(path.name, peaks) and path)
    write_metrics(
        tmp_path,
        [
            {
                "objective/kl": 1.0,
                "memory/update_peak_bytes": 2**19,
                "memory/rollout_peak_bytes": 3 * 2**20,
                "memory/score_peak_bytes": None,
            },
            {"objective/kl": None, "memory/rollout_peak_bytes": 2**20},
            {"objective/kl": 0.0, "objective/scores": None},
        ],
    )
    plot_run(tmp_path)
    # Phases come in the order of a PPO step, others after them; the peak of a phase is the highest of its steps.
    # score was not measured and is left out, not 0.
    assert drawn == {"kl.png": {"rollouts": ([1, 3], [1.0, 0.0])}, "memory.png": {"rollout": 3.0, "update": 0.5}}


def test_a_line_cut_short_by_a_crash(tmp_path):
    path = write_metrics(tmp_path, [{"a": 1.0}, {"a": 2.0}]) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "a"')
    assert [record["a"] for record in read_metrics(tmp_path)] == [1.0, 2.0]
    with path.open("a") as file:
        file.write('\n{"step": 4, "a": 3.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 3: not a JSON object; remove the line\."):
        read_metrics(tmp_path)


def test_every_plot_names_its_unit():
    assert all(plot.y_label and plot.title for plot in LINE_PLOTS)
    assert len({plot.file for plot in LINE_PLOTS}) == len(LINE_PLOTS)


def judged_records(steps: int, judged: bool = True) -> list[dict]:
    """Metrics of steps; at every other one an evaluation, the first of before training."""
    found = []
    for step in range(steps):
        record = {"step": step} | ({"rollout/distinct_2": 0.5} if step else {})
        if judged and step % 2 == 0:
            record |= {"eval/scores": 0.1 * step, "eval/kl": 0.5 * step, "eval/independent": -0.1 * step}
        found.append(record)
    return found


def write_records(folder: Path, records: list[dict], alarms: list[dict] = ()) -> Path:
    for name, rows in (("metrics.jsonl", records), ("alarms.jsonl", alarms)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_pictures_of_the_monitor(tmp_path):
    """Score and evaluator over the root of the KL need an evaluator; the others are drawn as far as they are measured."""
    folder = write_records(
        tmp_path, judged_records(9), [{"step": 4, "name": "over_optimisation"}, {"step": 5, "name": "ratio"}]
    )
    assert {path.name for path in plot_run(folder)} == {
        *("reward.png", "kl.png", "monitor.png", "over_optimisation.png"),
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    assert {path.name for path in plot_run(write_records(plain, judged_records(5, judged=False)))} == {"monitor.png"}


def test_what_is_drawn_over_the_root_of_the_kl(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(watch_plots, "_save", lambda figure, path: figures.append(figure) or path)
    alarms = [{"step": 4, "name": "over_optimisation"}, {"step": 3, "name": "ratio"}]
    watch_plots.draw_over_optimisation(judged_records(9), alarms, tmp_path / "a.png")
    axes, other = figures[0].axes
    away = [(0.5 * step) ** 0.5 for step in (0, 2, 4, 6, 8)]
    for place, factor in ((axes, 0.1), (other, -0.1)):
        x, y = place.lines[0].get_data()
        assert list(x) == pytest.approx(away)
        assert list(y) == pytest.approx([factor * step for step in (0, 2, 4, 6, 8)])
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert marks == pytest.approx([away[2]])  # the alarm of the ratio is not about these two
    assert watch_plots.draw_over_optimisation([{"step": 1, "eval/scores": 1.0}], [], tmp_path / "b.png") is None


def test_alarms_are_marked_in_every_panel(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(watch_plots, "_save", lambda figure, path: figures.append(figure) or path)
    watch_plots.draw_monitor(judged_records(9), [{"step": 4, "name": "ratio"}], tmp_path / "a.png")
    panels = figures[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["score", "evaluator", "KL from the reference", "distinct-2"]
    assert all(axes.get_ylabel() for axes in panels)
    assert all(any(list(line.get_xdata()) == [4, 4] for line in axes.lines) for axes in panels)
    assert panels[-1].get_xlabel() == "step"
    assert watch_plots.draw_monitor([{"step": 1, "objective/kl": 1.0}], [], tmp_path / "b.png") is None


def test_losses_of_other_size_have_axes_of_their_own(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or path)
    records = [{"loss/sft": 5.0, "loss/reward": 0.01 * i, "loss/total": 5.0, "eval/kl": 1.0} for i in range(12)]
    plot_run(write_metrics(tmp_path, records))
    kl, loss = figures
    assert [axes.get_title(loc="left") for axes in loss.axes] == [
        *("cross-entropy per token (nats)", "ranking loss per pair (nats)", "both, as weighted"),
    ]
    assert [len(axes.lines) for axes in loss.axes] == [1, 1, 1]
    assert loss.axes[1].get_ylim()[1] < 0.2
    assert len(kl.axes) == 1


def test_the_evaluation_before_training_is_in_each_curve(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_draw_lines", lambda path, plot, series: drawn.setdefault(path.name, series) and path)
    names = ("eval/scores", "eval/kl", "eval/response_length", "eval/loss", "eval/perplexity", "eval/reward_accuracy")
    write_records(tmp_path, [{"step": 0} | dict.fromkeys(names, 0.5), {"step": 4} | dict.fromkeys(names, 0.75)])
    plot_run(tmp_path)
    assert set(drawn) == {"reward.png", "kl.png", "length.png", "loss.png", "perplexity.png", "pair_accuracy.png"}
    assert all(points == ([0, 4], [0.5, 0.75]) for series in drawn.values() for points in series.values())


@pytest.mark.parametrize(("size", "unit", "label"), [(3 * 2**20, "MiB", "3"), (5 * 2**29, "GiB", "2.5")])
def test_memory_is_told_in_a_unit_that_people_say(tmp_path, monkeypatch, size, unit, label):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or path)
    plot_run(write_metrics(tmp_path, [{"memory/rollout_peak_bytes": size, "memory/score_peak_bytes": size // 2}]))
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == unit
    assert axes.texts[0].get_text() == label
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["rollout", "score"]


def test_ticks_are_round(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or path)
    plot_run(write_metrics(tmp_path, [{"objective/kl": 0.013 * i} for i in range(97)]))
    axes = figures[0].axes[0]
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        apart = float(ticks[1] - ticks[0])
        assert f"{apart:e}"[:3] in ("1.0", "2.0", "5.0")
