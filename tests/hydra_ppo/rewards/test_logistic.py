"""Linear heads, fitted to the end."""

import math

import pytest
import torch

from hydra_ppo.profiling.learning.head_rows import refit
from hydra_ppo.rewards.head_training import HeadTraining, LabelledPairs, margins_of, train_heads
from hydra_ppo.rewards.logistic import fit, fit_with_best_ridge
from tests.hydra_ppo.rewards.test_self_labels import DIM, ORIGIN, data


def test_one_number_by_hand():
    """Of four equal pairs three are won: without a ridge worth mentioning sigmoid(theta) = 3/4, so theta = log 3."""
    z = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert fit(z, 1e-12).item() == pytest.approx(math.log(3), abs=1e-6)


def test_a_ridge_by_hand():
    """One pair, z = 1, ridge 1: sigmoid(-theta) = theta, which 0.4010581 solves."""
    assert fit(torch.ones(1, 1, dtype=torch.float64), 1.0).item() == pytest.approx(0.4010581, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 2e-3)])
@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_it_ends_where_newton_does(dtype, tolerance, ridge):
    """Units that go together, as those of hidden states do: some directions are a hundred times narrower than others."""
    source = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(40, 40, generator=source, dtype=torch.float64))
    z = torch.randn(300, 40, generator=source, dtype=torch.float64) * torch.logspace(0, -2, 40, dtype=torch.float64) @ axes
    z = z / z.std(dim=0)
    z = torch.where((torch.rand(300, generator=source) < torch.sigmoid(z.sum(dim=1) / 6))[:, None], z, -z)
    found, wanted = z @ fit(z.to(dtype), ridge).double(), z @ refit(z, ridge)
    assert (found - wanted).norm() < tolerance * wanted.norm()


def test_the_ridge_is_what_held_out_pairs_like_best():
    source = torch.Generator().manual_seed(1)
    noise, held_out = (torch.randn(count, 60, generator=source, dtype=torch.float64) for count in (40, 4000))
    assert fit_with_best_ridge(noise, held_out)[1] == 1000.0  # nothing to learn: the less is learned the better
    clear = torch.randn(4000, 60, generator=source, dtype=torch.float64)
    clear = torch.where(clear[:, :1] > 0, clear, -clear)
    theta, ridge = fit_with_best_ridge(clear[:3000], clear[3000:])
    assert ridge == 0.1
    assert theta[0] > 10 * theta[1:].abs().max()


def test_without_held_out_pairs_the_largest_ridge_is_taken():
    assert fit_with_best_ridge(torch.randn(5, 3), torch.empty(0, 3))[1] == 1000.0


def test_heads_of_this_kind_are_as_right_as_their_pairs_allow():
    """4000 pairs say what ten numbers are worth: what heads say of others correlates above 0.99 with what is true."""
    states = data(0, 4400)
    worth = torch.linspace(-1, 1, DIM)
    found = train_heads(LabelledPairs(states), range(4000), range(4000, 4400), ORIGIN, HeadTraining("linear", members=2))
    assert (found.kind, found.count, len(found.measured["ridges"])) == ("linear", 2, 2)
    rows = range(4000, 4400)
    better, worse = LabelledPairs(states).read(rows)
    true = (better - worse) @ worth
    for margins in margins_of(found, LabelledPairs(states), rows).T:
        assert torch.corrcoef(torch.stack([margins, true]))[0, 1] > 0.99
    assert not torch.equal(found.layers[0][0][0], found.layers[0][0][1])  # each saw pairs of its own
