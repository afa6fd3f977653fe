"""What `linear_cost` found: how flat each figure is, as tables, as a picture and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

from hydra_ppo.profiling.benchmarks.phases import PHASES
from hydra_ppo.profiling.reporting.figures import blank

FLAT = 0.2
"""Relative difference between the largest and the smallest that still counts as flat."""

KIB = 2**10
FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One length and vocabulary; by phase (rollout, score, update), medians over the rounds.

    Attributes:
        response_tokens, vocabulary: of the cell.
        microseconds_per_token: time of the phase per response token.
        attention_microseconds_per_token: the part of it that attention itself takes.
        peak_bytes: most bytes alive above the static ones.
        peak_bytes_per_token: of a pass, its prompts included; for the rollout, of the rows decoded together.
        static_bytes: model and optimizer state.
        disturbed: rounds in which others used the machine, after repeats; None where the system does not say.
    """

    response_tokens: int
    vocabulary: int
    microseconds_per_token: dict[str, float]
    attention_microseconds_per_token: dict[str, float]
    peak_bytes: dict[str, int]
    peak_bytes_per_token: dict[str, float]
    static_bytes: int
    disturbed: int | None

    def without_attention(self, phase: str) -> float:
        """Return microseconds per response token that are not attention itself."""
        return self.microseconds_per_token[phase] - self.attention_microseconds_per_token[phase]


def spread(numbers: Sequence[float]) -> float:
    """Return by how much the largest is above the smallest, relative to that."""
    return max(numbers) / min(numbers) - 1


def spreads(cells: Sequence[Cell]) -> dict[str, float]:
    """Return the spread of each figure that is to be flat, by what it is.

    Times per token are compared over the lengths at one vocabulary, all of them and without attention itself; peaks per token
    of scoring and update over all cells.
    """
    found = {}
    for vocabulary in dict.fromkeys(cell.vocabulary for cell in cells):
        group = [cell for cell in cells if cell.vocabulary == vocabulary]
        for phase in PHASES:
            found[f"{phase} time, vocabulary {vocabulary}"] = spread([cell.microseconds_per_token[phase] for cell in group])
            rest = spread([cell.without_attention(phase) for cell in group])
            found[f"{phase} time without attention, vocabulary {vocabulary}"] = rest
    for phase in ("score", "update"):
        found[f"{phase} peak"] = spread([cell.peak_bytes_per_token[phase] for cell in cells])
    return found


def tables(cells: Sequence[Cell], title: str) -> list[Table]:
    """Return the cells, and how flat each figure is."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.caption = (
        "us: per response token, in brackets without attention itself. KiB: peak above model and optimizer state per "
    )
    shown.caption += "token of a pass (rollout: of the rows decoded together). * others used the machine."
    for column in ("V", "R", *(f"{phase} us" for phase in PHASES), *(f"{phase} KiB" for phase in PHASES)):
        shown.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        shown.add_row(
            str(cell.vocabulary),
            str(cell.response_tokens) + (" *" if cell.disturbed else ""),
            *(f"{cell.microseconds_per_token[phase]:.0f} ({cell.without_attention(phase):.0f})" for phase in PHASES),
            *(f"{cell.peak_bytes_per_token[phase] / KIB:.1f}" for phase in PHASES),
        )
    verdicts = Table(title=f"Largest over smallest; flat is within {FLAT:.0%}", title_justify="left")
    for column in ("per token", "above the smallest", ""):
        verdicts.add_column(column, justify="right" if column == "above the smallest" else "left", no_wrap=True)
    for name, found in spreads(cells).items():
        verdicts.add_row(name, f"{found:+.0%}", "flat" if found <= FLAT else "")
    return [shown, verdicts]


def figure(cells: Sequence[Cell]) -> Figure:
    """Return the picture: time per token by phase with and without attention itself, and the peak per token."""
    drawn = blank(11, 3.6)
    panels = drawn.subplots(1, len(PHASES) + 1)
    vocabularies = list(dict.fromkeys(cell.vocabulary for cell in cells))
    colours = dict(zip(vocabularies, ("#332288", "#cc6677", "#117733", "#ddcc77"), strict=False))
    for axes, phase in zip(panels, PHASES, strict=False):
        for vocabulary in vocabularies:
            group = [cell for cell in cells if cell.vocabulary == vocabulary]
            lengths = [cell.response_tokens for cell in group]
            style = {"color": colours.get(vocabulary, "#444444"), "marker": "o", "markersize": 4}
            axes.plot(lengths, [c.microseconds_per_token[phase] for c in group], label=f"vocabulary {vocabulary:,}", **style)
            label = "without attention itself" if vocabulary == vocabularies[-1] else None
            axes.plot(lengths, [c.without_attention(phase) for c in group], linestyle="--", label=label, **style)
        axes.set_title(phase, loc="left", fontsize=10)
    panels[0].set_ylabel("microseconds per response token")
    for vocabulary in vocabularies:
        group = [cell for cell in cells if cell.vocabulary == vocabulary]
        peaks = [max(cell.peak_bytes_per_token[phase] for phase in ("score", "update")) / KIB for cell in group]
        colour = colours.get(vocabulary, "#444444")
        panels[-1].plot([cell.response_tokens for cell in group], peaks, color=colour, marker="o", markersize=4)
    panels[-1].set_title("peak, KiB per token", loc="left", fontsize=10)
    lengths = sorted({cell.response_tokens for cell in cells})
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(0, 1.08 * max(number for line in axes.get_lines() for number in line.get_ydata()))
        axes.set_xlabel("response tokens")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=4)
    return drawn


def write(cells: Sequence[Cell], rounds: int, sizes: Mapping[str, int], path: Path) -> None:
    """Write the cells as JSON.

    Args:
        rounds: that the medians are over.
        sizes: that are the same in all cells, by name.
        path: file to write; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"format": FORMAT, "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": rounds}
    found |= {"sizes": dict(sizes), "spreads": spreads(cells), "cells": [asdict(cell) for cell in cells]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
