"""Linear reward heads, fitted to the end: Bradley and Terry's loss with a ridge is convex, so no learning rate is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

RIDGES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ridges that are tried, in the units of summed losses; the best on held-out pairs is taken."""
MOST_ITERATIONS = 500
GRADIENT = 1e-7
"""Largest gradient, of the mean loss, at which a fit has ended."""


def fit(z: Tensor, ridge: float, start: Tensor | None = None) -> Tensor:
    """Return theta (H,) that minimises the sum of -log sigmoid(z.theta) over pairs and ridge / 2 |theta|^2, by L-BFGS.

    Args:
        z: (n, H), scaled states of the better answers less those of the worse.
        ridge: above 0.
        start: (H,) to begin at; None is zeros.

    Memory: twenty vectors of H numbers.
    """
    theta = (z.new_zeros(z.shape[1]) if start is None else start.clone()).requires_grad_()
    descent = torch.optim.LBFGS(
        [theta],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        descent.zero_grad()
        total = softplus(-(z @ theta)).mean() + ridge / (2 * len(z)) * theta.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        descent.step(loss)
    return theta.detach()


def fit_with_best_ridge(z: Tensor, held_out: Tensor, ridges: Sequence[float] = RIDGES) -> tuple[Tensor, float]:
    """Fit with each ridge, and return theta (H,) of the lowest mean loss on held-out pairs, with its ridge.

    Args:
        z, held_out: (n, H) and (m, H), as of `fit`; where m is 0 the largest ridge is taken.
        ridges: to try; from the largest down, each fit begins where the one before ended.
    """
    found: list[tuple[float, float, Tensor]] = []
    theta: Tensor | None = None
    for ridge in sorted(ridges, reverse=True):
        theta = fit(z, ridge, theta)
        found.append((float(softplus(-(held_out @ theta)).mean()) if len(held_out) else 0.0, ridge, theta))
    _, ridge, best = min(found, key=lambda one: one[0])  # the first, hence the largest, of equal ones
    return best, ridge
