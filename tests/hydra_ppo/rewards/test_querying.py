"""Which pairs to label next: greedy against brute force, near-copies, and what picking is worth."""

from __future__ import annotations

import torch

from hydra_ppo.rewards.one_pass import OnePass
from hydra_ppo.rewards.querying import pick_next

DIM = 16


def taught(z: torch.Tensor, y: torch.Tensor) -> OnePass:
    head = OnePass(z.shape[1])
    for row, label in zip(z, y.tolist(), strict=True):
        head.update(row, label)
    return head


def test_it_is_what_inverting_each_time_picks():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    theta = torch.randn(6, generator=generator, dtype=torch.float64)
    hessian = torch.eye(6, dtype=torch.float64) * 0.5
    expected = []
    for _ in range(12):
        found = ((z @ torch.linalg.inv(hessian)) * z).sum(dim=1)
        found[expected] = -1.0
        row = int(found.argmax())
        expected.append(row)
        p = torch.sigmoid(z[row] @ theta)
        hessian = hessian + p * (1 - p) * torch.outer(z[row], z[row])
    picks = pick_next(z, theta, torch.eye(6) / 0.5, 12)
    assert [pick.row for pick in picks] == expected
    assert abs(picks[0].uncertainty - (z[picks[0].row].square().sum() / 0.5).sqrt().item()) < 1e-9
    assert abs(picks[0].p - torch.sigmoid(z[picks[0].row] @ theta).item()) < 1e-9


def test_near_copies_are_not_all_picked():
    """100 copies of one large difference, and four smaller ones in other directions: after a few copies the others come."""
    z = torch.zeros(104, 5)
    z[:100, 0] = 3.0
    for i in range(4):
        z[100 + i, 1 + i] = 1.5
    picks = [pick.row for pick in pick_next(z, torch.zeros(5), torch.eye(5), 8)]
    assert {100, 101, 102, 103} <= set(picks)
    # Without narrowing P all eight would be copies.
    assert all(row < 100 for row in ((z @ torch.eye(5)) * z).sum(dim=1).topk(8).indices.tolist())


def test_no_more_than_there_are():
    assert sorted(pick.row for pick in pick_next(torch.randn(3, 2), torch.zeros(2), torch.eye(2), 9)) == [0, 1, 2]


def accuracy(head: OnePass, z: torch.Tensor, theta: torch.Tensor) -> float:
    return ((z @ head.theta > 0) == (z @ theta > 0)).double().mean().item()


def test_picked_labels_teach_more_than_random_ones():
    """A pool of which most vary in two directions alone, as answers of one policy do; 10 seeds, 60 labels each way."""
    gains = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        theta, test = draw(DIM), draw(2000, DIM)
        pool = draw(1500, DIM)
        pool[:1400, 2:] *= 0.1
        labels = torch.bernoulli(torch.sigmoid(pool @ theta), generator=generator)
        order = torch.randperm(1500, generator=generator)
        first, rest = order[:20], order[20:]
        head = taught(pool[first], labels[first])
        picked = rest[[pick.row for pick in pick_next(pool[rest], head.theta, head.P, 60)]]
        found = []
        for rows in (torch.cat([first, picked]), order[:80]):
            found.append(accuracy(taught(pool[rows], labels[rows]), test, theta))
        gains.append(found[0] - found[1])
    mean = sum(gains) / len(gains)
    error = (sum((gain - mean) ** 2 for gain in gains) / 9 / 10) ** 0.5
    assert mean > 0.05, gains
    assert mean > 5 * error, gains
