"""Points in clusters."""

from __future__ import annotations

import torch
from torch import Tensor


def k_means(points: Tensor, count: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Return (N,) the number of the cluster of each point, by Lloyd's method from centres drawn as k-means++ draws them.

    Args:
        points: (N, H), N at least 1.
        count: clusters, at most N; some may come out empty where points coincide.
        generator: draws the first centres, on the points' device.
        rounds: of assigning and averaging.

    Memory: (N, count) distances.
    """
    centres = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]
    for _ in range(min(count, len(points)) - 1):
        distance = torch.cdist(points, centres).min(dim=1).values.square()
        weight = torch.where(distance.sum() > 0, distance, torch.ones_like(distance))
        drawn = torch.multinomial(weight, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = nearest.bincount(minlength=len(centres))[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(dim=1)
