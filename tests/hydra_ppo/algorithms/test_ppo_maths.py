"""The maths of PPO: hand-computed numbers with their arithmetic, and identities."""

import math

import pytest
import torch

from hydra_ppo.algorithms.advantages import explained_variance, gae
from hydra_ppo.algorithms.losses import importance_weights, logprob_drift, policy_loss, value_loss
from hydra_ppo.algorithms.masked import masked_mean, whiten
from hydra_ppo.algorithms.penalties import adaptive_kl_coef, kl_penalised_rewards, kl_penalty
from hydra_ppo.algorithms.preferences import ranking_loss

EXACT = 1e-6


def mask_of(*lengths: int, width: int = 4) -> torch.Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def random_batch(rows: int = 5, width: int = 7) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    mask = mask_of(*torch.randint(1, width + 1, (rows,)).tolist(), width=width)
    return (*(torch.randn(rows, width) for _ in range(4)), mask)


def test_masked_mean_leaves_out_what_does_not_count():
    x = torch.tensor([[1.0, 2.0, float("nan"), 9.0]])
    assert masked_mean(x, torch.tensor([[True, True, False, False]])).item() == pytest.approx(1.5)  # (1 + 2) / 2
    assert masked_mean(x, torch.zeros(1, 4, dtype=torch.bool)).item() == 0.0


def test_whiten_by_hand():
    x = torch.tensor([[1.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    # mean 2, variance ((1-2)² + (3-2)²) / 2 = 1: whitened -1, 1; with the mean kept 1, 3
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), torch.tensor([[1.0, 3.0, 0.0]]), rtol=EXACT, atol=EXACT)


def test_whiten_gives_mean_0_and_variance_1():
    x, _, _, _, mask = random_batch()
    w = whiten(x, mask)
    assert masked_mean(w, mask).item() == pytest.approx(0, abs=EXACT)
    assert masked_mean(w**2, mask).item() == pytest.approx(1, abs=1e-5)


def test_kl_estimators_by_hand():
    d = torch.tensor([[0.0, math.log(2), -math.log(2)]])
    zero = torch.zeros_like(d)
    torch.testing.assert_close(kl_penalty(d, zero, "k1"), d)
    # exp(-d) - 1 + d: 0; 1/2 - 1 + 0.6931; 2 - 1 - 0.6931
    torch.testing.assert_close(kl_penalty(d, zero, "k3"), torch.tensor([[0.0, 0.1931472, 0.3068528]]), rtol=EXACT, atol=EXACT)


def test_both_kl_estimators_are_unbiased():
    torch.manual_seed(0)
    p, q = torch.softmax(torch.randn(8), 0), torch.softmax(torch.randn(8), 0)
    true = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        expectation = (p * kl_penalty(p.log(), q.log(), estimator)).sum()
        torch.testing.assert_close(expectation, true, rtol=1e-5, atol=EXACT)


def test_rewards_by_hand():
    scores = torch.tensor([5.0, -1.0])
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]])
    ref = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -2.0, -7.0]])
    rewards = kl_penalised_rewards(scores, old, ref, mask_of(3, 2, width=3), kl_coef=0.1)
    # row 0: -0.1*(0.5, 0, -1) + (0, 0, 5);  row 1: -0.1*(0, 1) + (0, -1), padding 0
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.0, 5.1], [0.0, -1.1, 0.0]]))


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    advantages, returns = gae(rewards, values, mask_of(3, width=3), gamma=0.5, gae_lambda=0.5)
    # δ2 = 2 - 1.5 = 0.5;  δ1 = 0 + 0.5*1.5 - 1 = -0.25;  δ0 = 1 + 0.5*1 - 0.5 = 1
    # A2 = 0.5;  A1 = -0.25 + 0.25*0.5 = -0.125;  A0 = 1 + 0.25*-0.125 = 0.96875
    torch.testing.assert_close(advantages, torch.tensor([[0.96875, -0.125, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[1.46875, 0.875, 2.0]]))


def test_gae_lambda_1_is_discounted_return_minus_value():
    rewards, values, _, _, mask = random_batch()
    rewards = rewards * mask
    gamma = 0.9
    advantages, _ = gae(rewards, values, mask, gamma, gae_lambda=1.0)
    steps = torch.arange(rewards.shape[1])
    for t in range(rewards.shape[1]):
        discounted = (rewards[:, t:] * gamma ** (steps[t:] - t)).sum(1)
        torch.testing.assert_close(advantages[:, t], (discounted - values[:, t]) * mask[:, t], rtol=1e-5, atol=1e-5)


def test_gae_lambda_0_is_the_one_step_error():
    rewards, values, _, _, mask = random_batch()
    advantages, _ = gae(rewards * mask, values, mask, 0.9, gae_lambda=0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(values), 1)], dim=1)
    torch.testing.assert_close(advantages, (rewards * mask + 0.9 * following - values) * mask)


def test_gae_ignores_padding():
    rewards, values, _, _, mask = random_batch()
    clean = gae(rewards * mask, values * mask, mask, 0.99, 0.95)
    dirty = gae(rewards * mask, values.masked_fill(~mask, 1e3), mask, 0.99, 0.95)
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b)


def test_policy_loss_by_hand():
    old = torch.zeros(1, 3)
    new = torch.log(torch.tensor([[1.5, 0.5, 1.1]]))
    advantages = torch.tensor([[1.0, 1.0, -2.0]])
    out = policy_loss(new, old, advantages, mask_of(3, width=3), clip_range=0.2)
    # ratios 1.5, 0.5, 1.1: max(-1.5, -1.2) = -1.2; max(-0.5, -0.8) = -0.5; max(2.2, 2.2) = 2.2; mean 0.5 / 3
    assert out.loss.item() == pytest.approx(0.5 / 3, abs=EXACT)
    assert out.clip_frac.item() == pytest.approx(1 / 3, abs=EXACT)
    assert out.ratio.item() == pytest.approx(3.1 / 3, abs=EXACT)


def test_importance_weights_by_hand():
    sampler = torch.log(torch.tensor([[0.1, 0.2, 0.4, 0.5]]))
    old = torch.log(torch.tensor([[0.15, 0.1, 0.9, 0.5]])).requires_grad_()
    weights = importance_weights(old, sampler, cap=2.0)
    # 0.15 / 0.1, 0.1 / 0.2, 0.9 / 0.4 = 2.25 capped at 2, 1
    assert weights[0].tolist() == pytest.approx([1.5, 0.5, 2.0, 1.0], abs=EXACT)
    assert not weights.requires_grad


def test_a_weighted_policy_loss_by_hand():
    new = torch.log(torch.tensor([[1.5, 0.5, 1.1]]))
    advantages = torch.tensor([[1.0, 1.0, -2.0]])
    weights = torch.tensor([[2.0, 0.5, 1.0]])
    out = policy_loss(new, torch.zeros(1, 3), advantages, mask_of(3, width=3), 0.2, weights=weights)
    # of test_policy_loss_by_hand: -1.2, -0.5 and 2.2, weighed
    assert out.loss.item() == pytest.approx((-2.4 - 0.25 + 2.2) / 3, abs=EXACT)
    assert out.clip_frac.item() == pytest.approx(1 / 3, abs=EXACT)
    assert out.ratio.item() == pytest.approx(3.1 / 3, abs=EXACT)


def test_weights_without_a_cap_give_the_mean_over_the_policy():
    """Over all tokens of a vocabulary, drawn as the sampler would: sum q w A = sum p A."""
    p, q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).softmax(dim=-1).unbind()
    advantages = torch.randn(50, generator=torch.Generator().manual_seed(1))
    weights = importance_weights(p.log(), q.log(), cap=1e9)
    torch.testing.assert_close((q * weights * advantages).sum(), (p * advantages).sum())


def test_drift_by_hand():
    sampler, logprobs = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.75, 0.0]])
    assert logprob_drift(sampler, logprobs, mask_of(2, width=3)).tolist() == [0.375, 0.5]


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage():
    logprobs, advantages, _, _, mask = random_batch()
    out = policy_loss(logprobs, logprobs.clone(), advantages, mask, 0.2)
    torch.testing.assert_close(out.loss, -masked_mean(advantages, mask))
    assert out.approx_kl.item() == 0
    assert out.clip_frac.item() == 0


def test_policy_gradient_vanishes_where_clipped():
    new = torch.log(torch.tensor([[1.5, 1.1]])).requires_grad_()
    policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), mask_of(2, width=2), 0.2).loss.backward()
    # clipped at 1.2: gradient 0; else -A ρ / n = -1.1 / 2
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -0.55]]))


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 3.0]])
    old = torch.tensor([[0.0, 2.9]])
    returns = torch.tensor([[2.0, 3.0]])
    out = value_loss(values, old, returns, mask_of(2, width=2), value_clip_range=0.2)
    # first: clipped value 0.2, errors 1 and 3.24; second: inside the range, errors 0 and 0; ½ (3.24 + 0) / 2
    assert out.loss.item() == pytest.approx(0.81, abs=EXACT)
    assert out.clip_frac.item() == pytest.approx(0.5)
    assert value_loss(values, old, returns, mask_of(2, width=2), None).loss.item() == pytest.approx(0.25)  # ½ (1 + 0) / 2


@pytest.mark.parametrize("loss", ["policy", "value"])
def test_microbatches_with_the_minibatch_count_add_up(loss):
    a, b, c, _, mask = random_batch(rows=6)

    def compute(rows, count):
        if loss == "policy":
            return policy_loss(a[rows], b[rows], c[rows], mask[rows], 0.2, count).loss
        return value_loss(a[rows], b[rows], c[rows], mask[rows], 0.2, count).loss

    count = mask.sum()
    parts = sum(compute(slice(i, i + 2), count) for i in range(0, 6, 2))
    torch.testing.assert_close(parts, compute(slice(None), None))


def test_ranking_loss_by_hand():
    # -log sigmoid(0) = ln 2;  -log sigmoid(ln 3) = -ln(3/4)
    out = ranking_loss(torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(out, torch.tensor([math.log(2), math.log(4 / 3)]))


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = mask_of(3)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask).item() == pytest.approx(0)
    # errors 1, 0, -1 about returns 1, 2, 3 whose variance is 2/3: 1 - (2/3)/(2/3) = 0
    assert explained_variance(torch.tensor([[0.0, 2.0, 4.0, 0.0]]), returns, mask).item() == pytest.approx(0, abs=EXACT)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask).item())


def test_adaptive_kl_coef():
    assert adaptive_kl_coef(0.1, kl=6.0, target=6.0, horizon=1000, responses=100) == 0.1
    assert adaptive_kl_coef(0.1, kl=100.0, target=6.0, horizon=1000, responses=100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adaptive_kl_coef(0.1, kl=5.4, target=6.0, horizon=1000, responses=100) == pytest.approx(0.1 * (1 - 0.1 * 0.1))
