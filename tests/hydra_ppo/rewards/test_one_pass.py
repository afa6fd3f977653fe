"""The one-pass head against inverses and a fit by Newton's method."""

from __future__ import annotations

import math

import pytest
import torch

from hydra_ppo.rewards.one_pass import OnePass, centred, pessimistic_scores


def data(count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of features and labels drawn by Bradley-Terry."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    theta = torch.linspace(-1, 1, dim, dtype=torch.float64)
    return z, torch.bernoulli(torch.sigmoid(z @ theta), generator=generator)


def newton(z: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """The minimum of the logistic loss plus ridge/2 |theta|^2."""
    theta = torch.zeros(z.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(z @ theta)
        hessian = (z * (p * (1 - p))[:, None]).T @ z + ridge * torch.eye(len(theta), dtype=torch.float64)
        theta = theta - torch.linalg.solve(hessian, z.T @ (p - y) + ridge * theta)
    return theta


def test_p_is_the_inverse_of_the_sum():
    z, y = data(200, 12)
    head = OnePass(12, ridge=0.7)
    hessian = 0.7 * torch.eye(12, dtype=torch.float64)
    for row, label in zip(z, y.tolist(), strict=True):
        head.update(row, label)
        p = torch.sigmoid(row @ head.theta)  # at the new theta: the look-ahead
        hessian += p * (1 - p) * torch.outer(row, row)
    assert torch.allclose(head.hessian, hessian, rtol=0, atol=1e-10)
    assert (head.P - torch.linalg.inv(hessian)).abs().max() < 1e-8


def test_a_step_is_the_equation_with_matrices():
    z, y = data(30, 5)
    head = OnePass(5, ridge=2.0, eta=0.6)
    for row, label in zip(z, y.tolist(), strict=True):
        theta, before = head.theta.clone(), head.hessian.clone()
        p = torch.sigmoid(row @ theta)
        expected = theta - 0.6 * torch.linalg.solve(before + 0.6 * p * (1 - p) * torch.outer(row, row), (p - label) * row)
        loss = head.update(row, label)
        assert torch.allclose(head.theta, expected, rtol=0, atol=1e-12)
        assert loss == pytest.approx(torch.nn.functional.binary_cross_entropy(p, torch.tensor(label).double()).item())


def test_it_comes_to_the_fit_of_all_pairs():
    z, y = data(4000, 5)
    fit = newton(z, y, 1.0)
    head, distances = OnePass(5, ridge=1.0), []
    for _ in range(4):
        for row, label in zip(z, y.tolist(), strict=True):
            head.update(row, label)
        distances.append(((head.theta - fit).norm() / fit.norm()).item())
    assert distances[0] < 0.05  # one pass
    assert distances[-1] < 0.01
    assert distances[-1] < distances[0]
    # What one pass is for: it foretells as well as the fit.
    other, labels = data(4000, 5, seed=1)
    once = OnePass(5, ridge=1.0)
    for row, label in zip(z, y.tolist(), strict=True):
        once.update(row, label)
    right = [((other @ theta > 0) == (labels > 0.5)).double().mean().item() for theta in (once.theta, fit)]
    assert right[0] > right[1] - 0.01


def test_refreshing_takes_rounding_away():
    z, y = data(600, 8)
    drifting, fresh = (OnePass(8, ridge=1e-3, dtype=torch.float32, every=every) for every in (10**9, 100))
    for row, label in zip(z * 30, y.tolist(), strict=True):
        drifting.update(row, label)
        fresh.update(row, label)
    away = [(head.P.double() @ head.hessian - torch.eye(8)).abs().max().item() for head in (drifting, fresh)]
    assert away[1] < away[0]
    assert away[1] < 1e-2


def test_uncertainty_falls_where_pairs_were_seen():
    head = OnePass(3, ridge=1.0)
    along, across = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    assert head.uncertainty(torch.stack([along, across])).tolist() == [4.0, 4.0]
    theta = head.theta.clone()
    head.expect(along)  # at theta 0: weight 1/4, so Hbar is 2 along it
    assert head.uncertainty(torch.stack([along, across])).tolist() == pytest.approx([2.0, 4.0])
    assert torch.equal(head.theta, theta)


def test_pessimism_by_hand():
    phi = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 5.0]])
    groups = torch.tensor([7, 7, 2])
    assert centred(phi, groups).tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    found = pessimistic_scores(torch.tensor([1.0, 2.0, 3.0]), phi, torch.diag(torch.tensor([4.0, 1.0])), groups, 0.5)
    assert found.tolist() == [1.0 - 0.5 * 2.0, 2.0 - 0.5 * 2.0, 3.0]


def test_extreme_margins_stay_finite():
    head = OnePass(2, ridge=1e-6)
    for _ in range(5):
        assert math.isfinite(head.update(torch.tensor([1e4, -1e4])))
    assert head.theta.isfinite().all()
    with pytest.raises(ValueError, match="must be above 0"):
        OnePass(2, ridge=0.0)
