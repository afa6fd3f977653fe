"""Trains reward heads on stored states, on a CPU in minutes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hydra_ppo.algorithms.calibration import expected_calibration_error
from hydra_ppo.algorithms.reliability import pair_accuracy
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.origin import Origin
from hydra_ppo.rewards.features import read_pairs
from hydra_ppo.rewards.logistic import RIDGES, fit_with_best_ridge
from hydra_ppo.rewards.one_pass import OnePass
from hydra_ppo.rewards.stored_heads import Kind, StoredHeads, stacked

CHUNK = 2048
"""Pairs that are read at once where nothing is learned from them."""
TUNED_ON = 500
"""Of the first pairs, on which a one-pass head tries ridges; center and scale are those of these pairs too."""
LEAST_STEPS = 300
"""Optimizer steps that few pairs get too, so that epochs are more than asked for; early stopping ends them."""


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained; defaults are those of arXiv 2502.04357 but for `share`, which is arXiv 2401.16635's.

    Attributes:
        kind: linear (fitted to the end, `logistic.fit`), mlp (d - hidden - 1, ReLU), or one-pass (`one_pass.OnePass`, one
            member).
        members: k, each with pairs of its own, and an mlp's with an initialisation and an order of its own.
        hidden: widths of an mlp.
        share: of the training pairs that each member sees, drawn for itself.
        epochs: of an mlp, most passes over those.
        batch_size: of an mlp, pairs of a step.
        learning_rate: of an mlp, Adam's.
        patience: of an mlp, epochs without a better held-out loss after which a member is done; its best weights are kept.
        seed: of all of it.
    """

    kind: Kind = "mlp"
    members: int = 5
    hidden: tuple[int, ...] = (1024, 512)
    share: float = 0.8
    epochs: int = 30
    batch_size: int = 512
    learning_rate: float = 1e-3
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class LabelledPairs:
    """Stored pairs of which some are used, some of them the other way round.

    Attributes:
        states: (N, 2, H) fp16.
        swapped: (N,) bool, pairs whose second answer is the better one; None where none is.
    """

    states: np.ndarray
    swapped: np.ndarray | None = None

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return fp32 states (n, H) of the better and of the worse answers."""
        first, second = read_pairs(self.states, rows)
        if self.swapped is None:
            return first, second
        other = torch.from_numpy(self.swapped[np.asarray(rows, dtype=np.int64)])[:, None]
        return first.where(~other, second), second.where(~other, first)


def split_by_prompt(groups: Sequence[int], rows: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split pairs into those to train on and held-out ones; all pairs of a prompt come to the same side.

    Args:
        groups: number of the prompt of every stored pair.
        rows: the pairs to split.
        share: that is held out, about.

    Raises:
        ConfigError: where fewer than two prompts leave nothing to hold out.
    """
    prompts = sorted({int(groups[row]) for row in rows})
    if len(prompts) < 2:
        raise ConfigError(f"held_out={share} of the pairs of {len(prompts)} prompt leaves none to train on; give more prompts.")
    random.Random(seed).shuffle(prompts)
    counts = dict.fromkeys(prompts, 0)
    for row in rows:
        counts[int(groups[row])] += 1
    held: set[int] = set()
    taken = 0
    for prompt in prompts[:-1]:
        if held and taken + counts[prompt] / 2 > share * len(rows):
            break
        held.add(prompt)
        taken += counts[prompt]
    inside = [int(groups[row]) in held for row in rows]
    both = list(zip(rows, inside, strict=True))
    return [row for row, is_held in both if not is_held], [row for row, is_held in both if is_held]


def train_heads(
    pairs: LabelledPairs,
    train: Sequence[int],
    held_out: Sequence[int],
    origin: Origin,
    settings: HeadTraining,
    tell: Callable[[str], None] = lambda text: None,
) -> StoredHeads:
    """Train heads, and measure them on held-out pairs.

    The loss of a pair is -log sigmoid(f(better) - f(worse)), Bradley-Terry.

    Args:
        pairs: stored states, with what is known of their order.
        train, held_out: numbers of pairs.
        origin: of the states.
        settings: how.
        tell: told how it goes.

    Memory: of mlps, k members with gradients and Adam's moments, 16 bytes a weight, and a batch; the states stay on disk. Of
    linear heads, the differences of all pairs, H numbers each, fp64 up to H = 1024 and fp32 above.
    """
    if settings.kind == "one-pass":
        found, more = _one_pass(pairs, train, origin, settings)
    elif settings.kind == "linear":
        found, more = _fitted(pairs, train, held_out, origin, settings, tell)
    else:
        found, more = _by_adam(pairs, train, held_out, origin, settings, tell), {}
    margins = margins_of(found, pairs, held_out)
    measured = measure(margins) | more | {"pairs": len(train), "held_out": len(held_out), "seed": settings.seed}
    return replace(found, measured=measured)


def measure(margins: Tensor) -> dict[str, Any]:
    """Return what members say of held-out pairs, margins (n, k): accuracy of their mean with its error, of each, and ECE."""
    together = margins.mean(dim=1).tolist()
    accuracy, error = pair_accuracy(together)
    return {
        "accuracy": accuracy,
        "accuracy_se": error,
        "accuracies": [pair_accuracy(column)[0] for column in margins.T.tolist()],
        "ece": expected_calibration_error(margins.mean(dim=1)).item(),
        "loss": softplus(-margins.mean(dim=1)).mean().item(),
        "spread": margins.std(dim=1).mean().item() if margins.shape[1] > 1 else 0.0,
    }


def margins_of(heads: StoredHeads, pairs: LabelledPairs, rows: Sequence[int]) -> Tensor:
    """Return (n, k) by how much each member scores the better answer of some pairs above the worse."""
    found = []
    for start in range(0, len(rows), CHUNK):
        better, worse = pairs.read(rows[start : start + CHUNK])
        found.append(heads.members(better) - heads.members(worse))
    return torch.cat(found) if found else torch.zeros(0, heads.count)


def _by_adam(
    pairs: LabelledPairs,
    train: Sequence[int],
    held_out: Sequence[int],
    origin: Origin,
    settings: HeadTraining,
    tell: Callable[[str], None],
) -> StoredHeads:
    center, scale = _moments(pairs, train)
    sources = _sources(settings)
    widths = [origin.hidden_size, *settings.hidden, 1]
    layers = [_drawn(before, after, sources) for before, after in pairwise(widths)]
    parameters = [parameter for layer in layers for parameter in layer]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    own = _shares(train, settings, sources)
    count = own.shape[1]
    best, losses, waited = [p.detach().clone() for p in parameters], torch.full((settings.members,), math.inf), 0
    since = torch.zeros(settings.members, dtype=torch.int64)
    epochs = max(settings.epochs, math.ceil(LEAST_STEPS / math.ceil(count / settings.batch_size)))
    for epoch in range(1, epochs + 1):
        order = torch.stack([torch.randperm(count, generator=source) for source in sources])
        for start in range(0, count, settings.batch_size):
            rows = own.gather(1, order[:, start : start + settings.batch_size])  # (k, b)
            both = torch.cat([part.unflatten(0, rows.shape) for part in pairs.read(rows.flatten().tolist())], dim=1)
            scores = stacked(layers, (both - center) / scale)  # (k, 2 b)
            loss = softplus(scores[:, rows.shape[1] :] - scores[:, : rows.shape[1]]).mean(dim=1).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        found = _heads(layers, center, scale, origin)
        now = softplus(-margins_of(found, pairs, held_out)).mean(dim=0)  # (k,)
        better = now < losses
        losses, since = now.minimum(losses), torch.where(better, 0, since + 1)
        for kept, parameter in zip(best, parameters, strict=True):
            kept[better] = parameter.detach()[better]
        if waited < epoch // 10:
            waited = epoch // 10
            tell(f"epoch {epoch}: held-out loss {losses.mean().item():.4f}")
        if bool((since >= settings.patience).all()):
            break
    pieces = iter(best)
    found = _heads([(weight, next(pieces)) for weight in pieces], center, scale, origin)
    return replace(found, offset=_offset(found, pairs, train))


def _shares(train: Sequence[int], settings: HeadTraining, sources: Sequence[torch.Generator]) -> Tensor:
    """Return (k, count) numbers of the pairs that each member sees, in an order of its own."""
    count = max(1, round(settings.share * len(train)))
    numbers = torch.tensor(list(train))
    return torch.stack([numbers[torch.randperm(len(train), generator=source)[:count]] for source in sources])


def _fitted(
    pairs: LabelledPairs,
    train: Sequence[int],
    held_out: Sequence[int],
    origin: Origin,
    settings: HeadTraining,
    tell: Callable[[str], None],
) -> tuple[StoredHeads, dict[str, Any]]:
    """Fit each member to the end on its own pairs; its ridge is the one that held-out pairs like best."""
    center, scale = _moments(pairs, train)
    dtype = _dtype(origin)
    of_train, of_held_out = (_differences(pairs, rows, scale, dtype) for rows in (train, held_out))
    thetas, ridges = [], []
    places = range(len(train))
    for number, own in enumerate(_shares(places, settings, _sources(settings)), 1):
        theta, ridge = fit_with_best_ridge(of_train[own], of_held_out)
        tell(f"head {number} of {settings.members}: ridge {ridge:g}")
        thetas.append(theta.float()[None])
        ridges.append(ridge)
    layer = (torch.stack(thetas), torch.zeros(len(thetas), 1))
    found = StoredHeads("linear", (layer,), center, scale, torch.zeros(len(thetas)), None, origin)
    return replace(found, offset=_offset(found, pairs, train)), {"ridges": ridges}


def _differences(pairs: LabelledPairs, rows: Sequence[int], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (n, H) scaled states of the better answers less those of the worse."""
    found = torch.empty(len(rows), len(scale), dtype=dtype)
    for start in range(0, len(rows), CHUNK):
        better, worse = pairs.read(rows[start : start + CHUNK])
        found[start : start + CHUNK] = (better - worse) / scale
    return found


def _dtype(origin: Origin) -> torch.dtype:
    return torch.float64 if origin.hidden_size <= 1024 else torch.float32


def _sources(settings: HeadTraining) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * settings.seed + number) for number in range(settings.members)]


def _drawn(before: int, after: int, sources: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Return weight (k, out, in), uniform as nn.Linear's, and bias (k, out), zeros."""
    bound = 1 / math.sqrt(before)
    weights = [(torch.rand(after, before, generator=source) * 2 - 1) * bound for source in sources]
    return torch.stack(weights).requires_grad_(), torch.zeros(len(sources), after).requires_grad_()


def _heads(layers: Sequence[tuple[Tensor, Tensor]], center: Tensor, scale: Tensor, origin: Origin) -> StoredHeads:
    bare = tuple((weight.detach(), bias.detach()) for weight, bias in layers)
    return StoredHeads("mlp", bare, center, scale, torch.zeros(len(bare[0][0])), None, origin)


def _moments(pairs: LabelledPairs, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (H,) of the states of some pairs; 1 where a unit never changes."""
    total = squares = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), CHUNK):
        both = torch.cat(pairs.read(rows[start : start + CHUNK])).double()
        total, squares = total + both.sum(dim=0), squares + both.square().sum(dim=0)
    mean = total / (2 * len(rows))
    std = (squares / (2 * len(rows)) - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _offset(heads: StoredHeads, pairs: LabelledPairs, rows: Sequence[int]) -> Tensor:
    """Return (k,) the mean of each member over both answers of some pairs."""
    total = torch.zeros(heads.count, dtype=torch.float64)
    for start in range(0, len(rows), CHUNK):
        total += heads.members(torch.cat(pairs.read(rows[start : start + CHUNK]))).double().sum(dim=0)
    return (total / (2 * len(rows))).float()


def _one_pass(
    pairs: LabelledPairs, train: Sequence[int], origin: Origin, settings: HeadTraining
) -> tuple[StoredHeads, dict[str, Any]]:
    """See each pair once, in an order of its own; the ridge is the one that foretold the first pairs best."""
    order = list(train)
    random.Random(settings.seed).shuffle(order)
    first = order[:TUNED_ON]
    center, scale = _moments(pairs, first)
    dtype = _dtype(origin)

    def learn(ridge: float, rows: Sequence[int]) -> tuple[OnePass, float]:
        head, loss = OnePass(origin.hidden_size, ridge, dtype=dtype), 0.0
        for start in range(0, len(rows), CHUNK):
            better, worse = pairs.read(rows[start : start + CHUNK])
            loss += sum(head.update(z) for z in (better - worse) / scale)
        return head, loss / len(rows)

    ridge = min(RIDGES, key=lambda ridge: learn(ridge, first)[1])
    head, loss = learn(ridge, order)
    head.refresh()
    layer = (head.theta.float()[None, None], torch.zeros(1, 1))
    found = StoredHeads("one-pass", (layer,), center, scale, torch.zeros(1), head.P.float(), origin)
    return found, {"ridge": ridge, "online_loss": loss}
