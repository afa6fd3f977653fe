"""What the rows on reward models stand on: corpora with wrong labels, runs of sft on them, and heads on held-out pairs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.learning.shared import prepare_inputs, train_sft
from hydra_ppo.quickstart import corpus as reviews
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.runtime.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 1000
"""Held-out pairs, whose labels are right; the standard error of an accuracy of a half is 1.6 points."""
LABELS = 4000
"""Labelled pairs that its language model has not read."""
FRESH = 1000
"""Added to a seed for those."""
NO_LABELS = 0.5
"""Share of wrong labels at which they say nothing: the chosen answers are then answers, good and bad alike."""
ROWS = 32
"""Answers of a pass that only reads."""
NEVER = 10**9
"""Steps between two evaluations: none comes before the last step, so that right labels do not choose the model."""

Numbers = dict[str, Any]
"""Of a row on one seed, by column."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        group: rows of one group are compared with its first, seed by seed.
        make: measures it on a seed.
    """

    group: str
    make: Callable[[Ground], Numbers]


@dataclass(frozen=True)
class Ground:
    """One seed.

    Attributes:
        folder: keeps data, models and results of the seed; all tables may share it.
        seed: of corpora, models, training and sampling.
        pairs: that a language model, or a joint SFT, is trained on.
    """

    folder: Path
    seed: int
    pairs: int

    def check(self) -> None:
        """Refuse a folder that was begun with other sizes, and mark one that is new.

        Raises:
            ConfigError: naming both.
        """
        path, now = self.folder / "settings.json", {"pairs": self.pairs}
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(now) + "\n")
        before = json.loads(path.read_text())
        if before != now:
            raise ConfigError(
                f"pairs={self.pairs} is not what {str(self.folder)!r} was begun with, {before['pairs']}; give --pairs "
                f"{before['pairs']}, or another --output."
            )

    def place(self, noise: float) -> Path:
        """Return the folder of a corpus with a share of wrong labels among its training pairs; write what is not there."""
        place = self.folder / f"noise-{round(100 * noise)}"
        make = partial(reviews.make_corpus, self.seed, self.pairs, HELD_OUT, label_noise=noise)
        prepare_inputs(place, self.seed, make)
        return place

    def held_out(self, noise: float) -> Path:
        """Return the file of held-out pairs of that corpus."""
        return self.place(noise) / "data" / "eval.jsonl"

    def settings(self, noise: float, **changes: Any) -> SFTConfig:
        """Return the quickstart's settings of sft on that corpus, some of them changed; the last model is what counts."""
        config = quickstart.sft_config(self.place(noise), self.seed)
        return replace(config, run=replace(config.run, save_every=0), eval_every=NEVER, **changes)

    def joint(self, noise: float, name: str = "sft", **changes: Any) -> Path:
        """Return a run of joint SFT and reward modelling on that corpus; trained where it is not there."""
        return train_sft(self.settings(noise, **changes), self.place(noise) / name)

    def language_model(self) -> Path:
        """Return a run of SFT alone on answers without labels."""
        return self.joint(NO_LABELS, "sft-alone", reward_coef=0.0)

    def labels(self, count: int, noise: float) -> Path:
        """Return a file of labelled pairs that the language model has not read: the first `count` of `LABELS`.

        Args:
            noise: share of wrong labels among them all; about that among fewer.
        """
        folder = self.folder / f"labels-{round(100 * noise)}"
        whole, part = folder / "train.jsonl", folder / f"train-{count}.jsonl"
        if not whole.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            corpus = reviews.make_corpus(self.seed + FRESH, LABELS, label_noise=noise)
            write_whole(whole, quickstart.jsonl(quickstart.joined(pair) for pair in corpus.preferences))
        if not part.is_file():
            write_whole(part, "".join(whole.read_text().splitlines(keepends=True)[:count]))
        return part


def head_numbers(
    run: Path, pairs: Path, *, seed: int, noise: float = 0.0, aggregate: Any = "mean", coef: float = 0.0
) -> Numbers:
    """Measure the reward head of a run on pairs with right labels.

    Args:
        run: of sft.
        pairs: file of pairs.
        seed: draws which labels are turned round for `ece_noisy`.
        noise: share of those.
        aggregate, coef: what several heads say together, as of `combine_members`.

    Returns:
        accuracy; member_accuracy, the mean of each head's own; ece, and ece_noisy against labels of which `noise` are wrong;
        score_mean and score_sd over all answers.
    """
    import torch

    from hydra_ppo.algorithms.calibration import expected_calibration_error
    from hydra_ppo.algorithms.ensembles import combine_members
    from hydra_ppo.algorithms.reliability import pair_accuracy

    better, worse = pair_members(run, pairs)
    good, bad = (combine_members(part, aggregate, coef) for part in (better, worse))
    margins, scores = good - bad, torch.cat([good, bad])
    signs = torch.ones_like(margins)
    signs[random.Random(seed).sample(range(len(margins)), round(noise * len(margins)))] = -1.0
    alone = [pair_accuracy(column.tolist())[0] for column in (better - worse).T]
    return {
        "accuracy": pair_accuracy(margins.tolist())[0],
        "member_accuracy": sum(alone) / len(alone),
        "ece": expected_calibration_error(margins).item(),
        "ece_noisy": expected_calibration_error(margins * signs).item(),
        "score_mean": scores.mean().item(),
        "score_sd": scores.std(unbiased=False).item(),
    }


def pair_members(run: Path, pairs: Path) -> tuple[Tensor, Tensor]:
    """Return (n, k) what each reward head of a run says of the better answer of each pair, and of the worse.

    Memory: the final hidden states of one pass, (ROWS, T, H).
    """
    import torch

    from hydra_ppo.cli.opened import open_model, open_tokenizer
    from hydra_ppo.cli.pairs import load_pairs
    from hydra_ppo.cli.saved import run_config
    from hydra_ppo.experience import Experience
    from hydra_ppo.rollout.collect import ending_alike

    config = run_config(run, ["--data.train", str(pairs)])
    tokenizer = open_tokenizer(run, config)
    rows = load_pairs(str(pairs), tokenizer, config.data).loaded.rows
    opened = open_model(run, config, tokenizer, ["reward"])
    model = opened.model
    model.eval()
    prompts = [row.prompt_ids for row in rows] + [row.before_rejected for row in rows]
    answers = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
    experience = Experience.from_lists(prompts, answers, opened.pad_id, model.device)
    found = torch.zeros(len(answers), model.reward_heads)
    with torch.no_grad(), model.role("reward"):
        for group in experience.split(ROWS):
            found[group] = model.members(ending_alike(experience.select(group).sequences(), opened.ends)).cpu()
    return found[: len(rows)], found[len(rows) :]


def summary(run: Path) -> Mapping[str, Any]:
    """Return what a run says of itself at its end."""
    values: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return values


def slug(name: str) -> str:
    """Return the name of a row as that of a file."""
    return "-".join(re.findall(r"[\w.]+", name))
