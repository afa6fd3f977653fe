"""Rows on heads that are trained on stored states: seeing pairs once, choosing which to label, labelling the rest oneself.

The states are those of a language model that was tuned on answers without labels, so that what heads are right about they
learned from the labels they were given. A tenth of those are wrong; the held-out ones are right.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hydra_ppo.model.origin import Origin
from hydra_ppo.profiling.learning.reward_ground import LABELS, NO_LABELS, ROWS, Ground, Numbers, Row
from hydra_ppo.profiling.learning.reward_rows import COUNTS, FLOOR_NOISE
from hydra_ppo.rewards.features import GROUP, open_features
from hydra_ppo.rewards.head_training import (
    HeadTraining,
    LabelledPairs,
    margins_of,
    measure,
    split_by_prompt,
    train_heads,
)
from hydra_ppo.rewards.logistic import RIDGES
from hydra_ppo.rewards.querying import pick_next
from hydra_ppo.rewards.self_labels import self_label

ASKED = (256, 1000)
"""Labels after so many of which active and random picks are compared."""
FIRST = 64
"""Labels that both begin with, at random; as many as there are already are asked for at a time."""
SHARE = 0.15
"""Of the labels, what self-labelling begins with (arXiv 2411.00418)."""
VALIDATION = 0.2
"""Of the labels of a row, what stops training or judges rounds."""
WIDTHS = HeadTraining.hidden
"""Of the heads that label."""
NEWTON = 50
"""Most steps."""


@dataclass(frozen=True)
class States:
    """Stored states of labelled pairs, then of held-out ones.

    Attributes:
        pairs: (N + M, 2, H) fp16.
        groups: number of the prompt of each.
        labels: numbers of the N.
        held_out: numbers of the M.
        origin: of the states.
    """

    pairs: LabelledPairs
    groups: list[int]
    labels: list[int]
    held_out: list[int]
    origin: Origin


def heads() -> dict[str, Row]:
    """Return rows of refitting, linear heads and one pass over the number of pairs, of picks, and of self-labelling."""
    rows: dict[str, Row] = {}
    for count in COUNTS:
        for name, train in (("refitted", _refitted), ("linear", _fitted), ("one pass", _one_pass)):
            rows[f"{name}, {count} pairs"] = Row(f"{count} pairs", partial(_measured, partial(train, count)))
    for count in ASKED:
        for active in (False, True):
            name = f"{'active' if active else 'random'}, {count} labels"
            rows[name] = Row(f"{count} labels", partial(_measured, partial(_asked, active, count)))
    for name, label in (("15% of the labels", _few), ("self-labelled", _self_labelled), ("all labels", _all)):
        rows[name] = Row("self-labelling", partial(_measured, label))
    return rows


Trained = tuple[Tensor, Numbers]
"""Margins (M, k) on the held-out pairs, and what else there is to say."""


def _measured(train: Callable[[States, int], Trained], ground: Ground) -> Numbers:
    """Train, and return accuracy, calibration and processor seconds of it; states are stored before, where they are not."""
    states = stored_states(ground)
    begun = time.process_time()
    margins, numbers = train(states, ground.seed)
    seconds = time.process_time() - begun
    found = measure(margins)
    return {"accuracy": found["accuracy"], "ece": found["ece"], "processor": seconds, **numbers}


def stored_states(ground: Ground) -> States:
    """Return the language model's states of labelled and held-out pairs; written where they are not there."""
    from hydra_ppo.cli.features import features

    run = ground.language_model()
    parts = []
    sources = {"states": ground.labels(LABELS, FLOOR_NOISE), "states-held-out": ground.held_out(NO_LABELS)}
    for name, source in sources.items():
        if not (ground.folder / name / "features.json").is_file():
            features(run, str(source), ground.folder / name, rows=ROWS)
        parts.append(open_features(ground.folder / name))
    known, held_out = parts
    return States(
        LabelledPairs(np.concatenate([known.states, held_out.states])),
        known.pairs[:, GROUP].tolist(),
        list(range(len(known))),
        list(range(len(known), len(known) + len(held_out))),
        known.origin,
    )


def _linear(kind: Any, seed: int) -> HeadTraining:
    return HeadTraining(kind=kind, members=1, share=1.0, seed=seed)


def _one_pass(count: int, states: States, seed: int) -> Trained:
    """See each pair once; the ridge is chosen on the first 500."""
    found = train_heads(states.pairs, states.labels[:count], states.held_out, states.origin, _linear("one-pass", seed))
    return margins_of(found, states.pairs, states.held_out), {}


def _fitted(count: int, states: States, seed: int) -> Trained:
    """Train a linear head as `hydra-ppo heads` does, with a fifth of the pairs for its ridge."""
    train, validation = split_by_prompt(states.groups, states.labels[:count], VALIDATION, seed)
    found = train_heads(states.pairs, train, validation, states.origin, _linear("linear", seed))
    return margins_of(found, states.pairs, states.held_out), {}


def _refitted(count: int, states: States, seed: int) -> Trained:
    """Fit a logistic regression to the end, with the ridge that a fifth of the pairs likes best, then to all of them."""
    rows = states.labels[:count]
    better, worse = states.pairs.read(rows)
    scale = _scale(better, worse)
    z = (better - worse).double() / scale  # (n, H)
    train, validation = split_by_prompt(states.groups, rows, VALIDATION, seed)

    def loss(ridge: float) -> float:
        return _logistic(z[validation] @ refit(z[train], ridge))

    theta = refit(z, min(RIDGES, key=loss))
    better, worse = states.pairs.read(states.held_out)
    return ((better - worse).double() / scale @ theta)[:, None].float(), {}


def _scale(better: Tensor, worse: Tensor) -> Tensor:
    """Return (H,) the standard deviation of states; 1 where a unit never changes."""
    std = torch.cat([better, worse]).double().std(dim=0, unbiased=False)
    return torch.where(std > 1e-6, std, 1.0)


def _logistic(margins: Tensor) -> float:
    return float(softplus(-margins).mean())


def refit(z: Tensor, ridge: float) -> Tensor:
    """Return theta (H,) that minimises the sum of -log sigmoid(z.theta) over pairs and ridge / 2 |theta|^2.

    By Newton's method, each step halved until it lowers the sum.

    Args:
        z: (n, H) fp64, features of the better answers less those of the worse.
        ridge: above 0.

    Memory: the Hessian, H^2 numbers.
    """

    def total(theta: Tensor) -> float:
        return float(softplus(-(z @ theta)).sum() + ridge / 2 * theta.square().sum())

    theta = z.new_zeros(z.shape[1])
    for _ in range(NEWTON):
        p = torch.sigmoid(z @ theta)
        gradient = z.T @ (p - 1) + ridge * theta
        if float(gradient.abs().max()) < 1e-8:
            break
        hessian = (z * (p * (1 - p))[:, None]).T @ z
        hessian.diagonal().add_(ridge)
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        now = total(theta)
        while total(theta - step) > now and float(step.abs().max()) > 1e-12:
            step = step / 2
        theta = theta - step
    return theta


def _asked(active: bool, count: int, states: States, seed: int) -> Trained:
    """Begin with `FIRST` labels at random and ask for more, until there are `count`, as label-next does or at random."""
    order = list(states.labels)
    random.Random(seed).shuffle(order)
    known, left = order[:FIRST], order[FIRST:]
    training = _linear("one-pass", seed)
    found = train_heads(states.pairs, known, states.held_out, states.origin, training)
    while len(known) < count and left:
        wanted = min(len(known), count - len(known))
        if active:
            assert found.inverse is not None
            first, second = states.pairs.read(left)
            picks = pick_next((first - second) / found.scale, found.layers[0][0][0, 0], found.inverse, wanted)
            new = [left[pick.row] for pick in picks]
        else:
            new = left[:wanted]
        asked = set(new)
        known, left = known + new, [row for row in left if row not in asked]
        found = train_heads(states.pairs, known, states.held_out, states.origin, training)
    return margins_of(found, states.pairs, states.held_out), {}


def _labelling(seed: int) -> HeadTraining:
    return HeadTraining(hidden=WIDTHS, seed=seed)


def _shares(states: States, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Return pairs without a label, and those with one that train and that judge."""
    pool, known = split_by_prompt(states.groups, states.labels, SHARE, seed + 1)
    train, validation = split_by_prompt(states.groups, known, VALIDATION, seed)
    return pool, train, validation


def _few(states: States, seed: int) -> Trained:
    _, train, validation = _shares(states, seed)
    found = train_heads(states.pairs, train, validation, states.origin, _labelling(seed))
    return margins_of(found, states.pairs, states.held_out), {}


def _all(states: States, seed: int) -> Trained:
    train, validation = split_by_prompt(states.groups, states.labels, VALIDATION, seed)
    found = train_heads(states.pairs, train, validation, states.origin, _labelling(seed))
    return margins_of(found, states.pairs, states.held_out), {}


def _self_labelled(states: States, seed: int) -> Trained:
    """Label in rounds; `agreement` is with the labels that were hidden, a tenth of them wrong."""
    pool, train, validation = _shares(states, seed)
    found = self_label(states.pairs.states, train, validation, pool, states.origin, _labelling(seed))
    right = [not other for _, other in found.labels.values()]
    numbers: Numbers = {"labelled": float(len(right))}
    if right:
        numbers["agreement"] = sum(right) / len(right)
    return margins_of(found.heads, states.pairs, states.held_out), numbers
