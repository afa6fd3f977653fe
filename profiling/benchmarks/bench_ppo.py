"""The phases of one PPO step on a small Llama: sampling, scoring, update.

Tokens are response tokens, as in the trainer's own tokens per second; so the three rates are of the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_ppo.config.settings import OptimizerSettings, RolloutSettings
from hydra_ppo.experience import FinishedExperience, ScoredExperience
from hydra_ppo.profiling.benchmarks.measure import measure
from hydra_ppo.profiling.benchmarks.trainers import endless_llama, make_trainer, random_model, random_prompts
from hydra_ppo.rollout.collect import collect_experience, score
from hydra_ppo.rollout.sampling import Samples, sample
from hydra_ppo.training.optim import state_tensors
from hydra_ppo.training.ppo_advantages import with_advantages

TOLERANCE = 1e-4
"""Absolute, nats, between log-probs from the KV cache and from one pass, both in fp32."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model (hidden, layers, vocabulary) and of the step (responses, tokens each, responses per pass)."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 32_000
    prompts: int = 8
    prompt_tokens: int = 32
    response_tokens: int = 32
    microbatch: int = 4

    @property
    def tokens(self) -> int:
        """Response tokens of a step."""
        return self.prompts * self.response_tokens


class Step:
    """A trainer and all that one of its steps goes through, phase by phase.

    One PPO epoch of one minibatch; all settings that are not in `sizes` are the trainer's own, checkpointing included.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.model = random_model(
            endless_llama(
                vocab_size=sizes.vocabulary,
                hidden_size=sizes.hidden,
                intermediate_size=4 * sizes.hidden,
                num_hidden_layers=sizes.layers,
                num_attention_heads=4,
                max_position_embeddings=sizes.prompt_tokens + sizes.response_tokens,
            )
        )
        self.model.enable_checkpointing()
        self.prompts = random_prompts(sizes.vocabulary, sizes.prompt_tokens, sizes.prompts)
        self.trainer = make_trainer(
            self.model,
            self.prompts,
            RolloutSettings(batch_size=sizes.prompts, max_new_tokens=sizes.response_tokens, score_batch_size=sizes.microbatch),
            optimizer=OptimizerSettings(learning_rate=1e-5),
            ppo_epochs=1,
            minibatch_size=sizes.prompts,
            microbatch_size=sizes.microbatch,
        )
        self.config = self.trainer.config
        self.experience = self.collect()

    def collect(self) -> FinishedExperience:
        """Sample and score, and fill in the advantages."""
        found = collect_experience(
            self.model,
            self.prompts,
            self.config.rollout,
            eos_ids=self.trainer.eos_ids,
            pad_id=self.trainer.pad_id,
            generator=_generator(),
        )
        return with_advantages(found, found.scores, self.config, self.config.kl.coef)

    def sample(self) -> Samples:
        """Sample the responses: always the same."""
        return sample(self.model, self.prompts, self.config.rollout, self.trainer.eos_ids, _generator())

    def score(self) -> ScoredExperience:
        """Do the two scoring passes over responses that are there already."""
        return score(self.model, self.experience, self.experience.old_logprobs, self.config.rollout)

    def update(self) -> dict[str, float | None]:
        """Do forward and backward passes of actor and critic, and one optimizer step."""
        return self.trainer.update(self.experience)

    def alive(self) -> list[Tensor]:
        """Return the tensors that outlive a phase: model, optimizer state, experience."""
        held = [*self.model.parameters(), *self.model.buffers(), *state_tensors(self.trainer.progress.optimizer)]
        return held + [value for value in vars(self.experience).values() if isinstance(value, Tensor)]


@torch.no_grad()
def check_agreement(step: Step) -> None:
    """Raise an AssertionError unless the sampler's log-probs are those of one pass over the whole rows.

    Actor and reference are still the same model, so the scoring pass has to give them too.
    """
    experience = step.experience
    assert experience.response_lengths == [step.config.rollout.max_new_tokens] * len(step.prompts)
    with step.model.role("actor"):
        once = step.model.logprobs(experience.sequences()).logprobs
    torch.testing.assert_close(experience.old_logprobs, once, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(step.score().ref_logprobs, once, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def step() -> Step:
    step = Step(Sizes())
    check_agreement(step)
    step.update()  # makes the optimizer's state, which is alive from then on
    return step


@pytest.mark.parametrize("phase", ["sample", "score", "update"])
def test_phase(benchmark: Any, step: Step, phase: str) -> None:
    measure(
        benchmark, "phase of a PPO step", {phase: getattr(step, phase)}, rounds=5, tokens=Sizes().tokens, alive=step.alive()
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
