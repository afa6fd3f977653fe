"""k-means, and the best of each group."""

from __future__ import annotations

import torch

from hydra_ppo.algorithms.clusters import best_of_each, kmeans


def test_clouds_that_are_apart_are_groups():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    owners = torch.randint(3, (60,), generator=generator)
    points = centres[owners] + 0.5 * torch.randn(60, 2, generator=generator)
    groups = kmeans(points, 3, torch.Generator().manual_seed(1))
    for a in range(3):
        assert len(groups[owners == a].unique()) == 1
    assert len(groups.unique()) == 3


def test_equal_points_are_one_group():
    assert kmeans(torch.ones(5, 3), 4, torch.Generator().manual_seed(0)).tolist() == [0] * 5


def test_more_groups_than_points():
    points = torch.tensor([[0.0], [1.0]])
    assert sorted(kmeans(points, 10, torch.Generator().manual_seed(0)).tolist()) == [0, 1]


def test_the_best_of_each_group():
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0, -5.0, -6.0])
    assert best_of_each(groups, scores, 0.5) == [1, 2, 4]
    assert best_of_each(groups, scores, 0.01) == [1, 4]  # at least one of each
    assert best_of_each(groups, scores, 1.0) == [0, 1, 2, 3, 4, 5]
