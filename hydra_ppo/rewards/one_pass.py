"""A linear reward head that sees each pair once, with its exact uncertainty (arXiv 2502.07193)."""

from __future__ import annotations

import torch
from torch import Tensor

EVERY = 1000
"""Pairs after which P is inverted anew, so that rounding does not add up."""


class OnePass:
    """Online mirror descent on the logistic loss of pairs, one Newton-like step for each, then the pair is forgotten.

    With z = phi(chosen) - phi(rejected), y = 1 where that is the better one, g = (s(z.theta) - y) z and
    H(theta) = s'(z.theta) z z^T, a pair does (arXiv 2502.07193, its update with look-ahead)

        theta <- theta - eta (Hbar + eta H(theta))^-1 g(theta);    Hbar <- Hbar + H(theta), at the new theta.

    What is kept is P = Hbar^-1, which Sherman-Morrison brings up to date exactly in 2 d^2 multiplications. The paper's released
    code approximates both by conjugate gradients. Departure: theta is not projected onto a ball; `ridge`, with which Hbar
    begins, is what holds it.

    Args:
        dim: d, of the features.
        ridge: Hbar begins as ridge * identity; must be above 0.
        eta: step size; 1 is the Newton step.
        dtype: of theta and P; the sum Hbar is kept in fp64.
        every: pairs after which P is inverted from Hbar in fp64.

    Attributes:
        theta: (d,).
        P: (d, d), the inverse of Hbar.
        hessian: (d, d) fp64, Hbar.
        count: pairs seen.

    Memory: P and Hbar, d^2 of 4 or 8 bytes and d^2 of 8; 192 MiB in fp32 at d = 4096.
    """

    def __init__(
        self, dim: int, ridge: float = 1.0, eta: float = 1.0, dtype: torch.dtype = torch.float64, every: int = EVERY
    ) -> None:
        if ridge <= 0 or eta <= 0:
            raise ValueError(f"ridge={ridge} and eta={eta} must be above 0; choose for example 1.")
        self.ridge, self.eta, self.every, self.count = ridge, eta, every, 0
        self.theta = torch.zeros(dim, dtype=dtype)
        self.P = torch.eye(dim, dtype=dtype) / ridge
        self.hessian = torch.eye(dim, dtype=torch.float64) * ridge

    def update(self, z: Tensor, y: float = 1.0) -> float:
        """Take in one pair.

        Args:
            z: (d,) features of one answer less those of the other.
            y: 1 where the first is better, 0 where the other is; in between for a share of judges.

        Returns:
            The logistic loss of the pair before it was learned from, nats.
        """
        z = z.to(self.theta.dtype)
        towards = self.P @ z  # (d,)
        width = float(z @ towards)
        margin = float(z @ self.theta)
        p = _sigmoid(margin)
        # (Hbar + eta w z z^T)^-1 z = P z / (1 + eta w z.P z)
        step = self.eta * (p - y) / (1 + self.eta * p * (1 - p) * width)
        self.theta -= step * towards
        after = _sigmoid(float(z @ self.theta))
        self._remember(z, towards, width, after * (1 - after))
        return -(y * _log_sigmoid(margin) + (1 - y) * _log_sigmoid(-margin))

    def expect(self, z: Tensor) -> None:
        """Narrow P as the pair will whichever way it is judged, by p (1 - p) z z^T at theta, which stays."""
        z = z.to(self.theta.dtype)
        towards, p = self.P @ z, _sigmoid(float(z @ self.theta))
        self._remember(z, towards, float(z @ towards), p * (1 - p))

    def _remember(self, z: Tensor, towards: Tensor, width: float, weight: float) -> None:
        """Add weight * z z^T to Hbar; towards is P z, width z.P z."""
        self.hessian.addr_(z.double(), z.double(), alpha=weight)
        self.P.addr_(towards, towards, alpha=-weight / (1 + weight * width))
        self.count += 1
        if self.count % self.every == 0:
            self.refresh()

    def refresh(self) -> None:
        """Invert Hbar from scratch, in fp64."""
        self.P = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian)).to(self.theta.dtype)

    def uncertainty(self, z: Tensor) -> Tensor:
        """Return z.P z of each row of z (N, d), or of one (d,): how little is known of which of the two is better."""
        return quadratic(z.to(self.theta.dtype), self.P)


def quadratic(z: Tensor, matrix: Tensor) -> Tensor:
    """Return z.M z over the last dimension, never below 0, which rounding could make of a variance."""
    return ((z @ matrix) * z).sum(dim=-1).clamp(min=0)


def pessimistic_scores(scores: Tensor, phi: Tensor, inverse: Tensor, groups: Tensor, coef: float) -> Tensor:
    """Return scores less coef * sqrt(phi_c.P phi_c), phi_c what a response's features have beyond the mean of its prompt's.

    Passive pessimism of arXiv 2502.07193, for each response: a reward model of pairs knows differences between
    answers to one prompt alone, so features are held against those of the prompt's other answers in the batch. A prompt with
    one answer has no difference, and no penalty.

    Args:
        scores: (B,).
        phi: (B, d) features.
        inverse: (d, d) P.
        groups: (B,) integers, alike where the prompt is.
        coef: factor of the penalty.
    """
    return scores - coef * quadratic(centred(phi, groups), inverse).sqrt()


def centred(phi: Tensor, groups: Tensor) -> Tensor:
    """Return features (B, d) less the mean of those with the same number in groups (B,)."""
    _, index = groups.unique(return_inverse=True)
    count = index.bincount().to(phi.dtype)  # (G,)
    sums = phi.new_zeros(len(count), phi.shape[1]).index_add_(0, index, phi)
    return phi - (sums / count[:, None])[index]


def _sigmoid(value: float) -> float:
    return float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))


def _log_sigmoid(value: float) -> float:
    return float(torch.nn.functional.logsigmoid(torch.tensor(value, dtype=torch.float64)))
