"""k-means finds what is apart."""

from __future__ import annotations

import torch

from hydra_ppo.algorithms.clusters import k_means


def test_groups_that_lie_apart_are_found():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
        truth = torch.arange(60) % 3
        points = centres[truth] + 0.5 * torch.randn(60, 2, generator=generator)
        found = k_means(points, 3, generator)
        for group in range(3):
            assert len(found[truth == group].unique()) == 1
        assert len(found.unique()) == 3


def test_fewer_points_than_clusters_and_points_that_coincide():
    generator = torch.Generator().manual_seed(0)
    assert len(k_means(torch.tensor([[0.0], [5.0]]), 8, generator).unique()) == 2
    assert len(k_means(torch.ones(6, 3), 4, generator).unique()) == 1
