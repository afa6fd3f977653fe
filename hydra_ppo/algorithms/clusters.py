"""Groups of points that lie near each other."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(points: Tensor, clusters: int, generator: torch.Generator, rounds: int = 50) -> Tensor:
    """Group points by their nearest of so many means.

    The first means are drawn as k-means++ draws them (Arthur and Vassilvitskii 2007): each far from those before, with a chance
    that grows with its squared distance. Rounds end where no point changes its group.

    Args:
        points: (N, D), on the CPU.
        clusters: most groups; there are fewer where points are fewer or equal.
        generator: draws the first means.
        rounds: at most so many.

    Returns:
        (N,) int64 number of each point's group.

    Memory: (N, clusters) distances, in fp64.
    """
    points = points.double()
    means = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(min(clusters, len(points)) - 1):
        near = torch.cdist(points, means).square().amin(dim=1)
        if not bool((near > 0).any()):
            break
        means = torch.cat([means, points[torch.multinomial(near, 1, generator=generator)]])
    groups = torch.cdist(points, means).argmin(dim=1)
    for _ in range(rounds):
        sums = torch.zeros_like(means).index_add_(0, groups, points)
        counts = torch.bincount(groups, minlength=len(means))[:, None]
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)  # one that lost all its points stays
        moved = torch.cdist(points, means).argmin(dim=1)
        if torch.equal(moved, groups):
            break
        groups = moved
    return groups


def best_of_each(groups: Tensor, scores: Tensor, share: float) -> list[int]:
    """Return the numbers of the points with the highest scores of each group, a share of it and at least one, in order.

    Args:
        groups, scores: (N,).
    """
    kept: list[int] = []
    for group in groups.unique().tolist():
        members = (groups == group).nonzero()[:, 0]
        count = max(1, round(share * len(members)))
        kept += members[scores[members].argsort(descending=True, stable=True)[:count]].tolist()
    return sorted(kept)
