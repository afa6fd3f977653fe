"""The picture of what a trunk does to learning: gold score and win rate over the number of layers without adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hydra_ppo.profiling.learning.compare import Outcome, by_setting
from hydra_ppo.profiling.learning.shared import mean, standard_error
from hydra_ppo.profiling.reporting.figures import blank, clean, save

COLOUR = "#332288"
SEED_COLOUR = "#88ccee"
QUIET = {"color": "#555555", "linestyle": "--", "linewidth": 1.0}


def draw_trunks(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw gold score after PPO and win rate over `trunk_layers`, means with standard errors over seeds; return `path`."""
    return save(trunk_figure(outcomes), path)


def trunk_figure(outcomes: Sequence[Outcome]) -> Figure:
    """Return the figure that `draw_trunks` saves.

    Args:
        outcomes: of one method, at least one.
    """
    groups = {trunk: rows for (_, trunk), rows in sorted(by_setting(outcomes).items())}
    figure = blank(8.0, 3.6)
    panels = (
        ("gold_after", "gold score after PPO", mean([row.gold_before for row in outcomes]), "before PPO"),
        ("win_rate", "win rate against the SFT policy", 0.5, "a tie"),
    )
    for axes, (name, title, level, what) in zip(figure.subplots(1, 2), panels, strict=True):
        found = {trunk: [getattr(row, name) for row in rows] for trunk, rows in groups.items()}
        for trunk, values in found.items():
            axes.plot([trunk] * len(values), values, ".", color=SEED_COLOUR, markersize=5)
        errors = [standard_error(values) if len(values) > 1 else 0.0 for values in found.values()]
        means = [mean(values) for values in found.values()]
        axes.errorbar(list(found), means, errors, color=COLOUR, marker="o", markersize=5, capsize=4, linewidth=1.3)
        axes.axhline(level, **QUIET)
        axes.annotate(
            what, (1, level), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8
        )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("trunk_layers: lowest layers without adapters", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        clean(axes)
    seeds = len({row.seed for row in outcomes})
    figure.suptitle(f"{outcomes[0].method}: mean and standard error over {seeds} seeds, light points are the seeds", fontsize=9)
    return figure
