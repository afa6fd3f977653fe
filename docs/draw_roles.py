"""Draws docs/roles.png: one base, four roles.  python docs/draw_roles.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, GREY = "#222222", "#777777"
BASE, ACTOR, CRITIC, OFF = "#d9dee6", "#f2c14e", "#7fb7be", "#ffffff"
ROLES = (  # name, adapter, head, what comes out, colour of the adapter
    ("actor", "LoRA  actor", "lm head", "log-probs, samples", ACTOR),
    ("critic", "LoRA  critic", "value head", "values", CRITIC),
    ("reference", "adapters off", "lm head", "log-probs", OFF),
    ("reward", "adapters off", "reward head", "scores", OFF),
)


def box(axes: plt.Axes, x: float, y: float, width: float, height: float, text: str, colour: str, **style: object) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec=INK, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **{"fontsize": 10, **style})


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 4.2))
    axes.set(xlim=(0, 9), ylim=(0, 4.2))
    axes.axis("off")
    box(axes, 0.3, 0.3, 8.4, 0.75, "one base in memory  (4-bit, 8-bit or plain; frozen)", BASE, fontsize=11)
    for i, (name, adapter, head, output, colour) in enumerate(ROLES):
        x = 0.3 + 2.15 * i
        trained = colour != OFF
        axes.text(x + 0.975, 3.95, name, ha="center", va="center", fontsize=12, fontweight="bold", color=INK)
        axes.text(x + 0.975, 3.6, output, ha="center", va="center", fontsize=9, color=GREY)
        box(axes, x, 2.55, 1.95, 0.6, head, CRITIC if head == "value head" else OFF)
        box(axes, x, 1.55, 1.95, 0.6, adapter, colour, style="normal" if trained else "italic")
        for y in (1.05, 2.15):
            gap = 0.5 if y < 2 else 0.4
            axes.annotate("", (x + 0.975, y + gap), (x + 0.975, y), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1})
        axes.annotate("", (x + 0.975, 3.5), (x + 0.975, 3.15), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1})
    axes.plot([4.5, 8.8, 8.8, 4.5, 4.5], [1.4, 1.4, 3.25, 3.25, 1.4], ls="--", color=GREY, lw=1)
    axes.text(6.65, 2.35, "one pass for both", ha="center", va="center", fontsize=9, color=GREY)
    axes.text(4.5, 0.1, "coloured boxes are trained in PPO; all else is frozen", ha="center", fontsize=9, color=GREY)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).with_name("roles.png"))
