"""The phases of one PPO step on a small Llama: sampling, scoring, update.

Tokens are response tokens, as in the trainer's own tokens per second; so the three rates are of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hydra_ppo.config.settings import DataSettings, ModelSettings, OptimizerSettings, PPOConfig, RolloutSettings, RunSettings
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.benchmarks import measure
from hydra_ppo.rollout.collect import collect_experience, score
from hydra_ppo.rollout.sampling import Samples, sample
from hydra_ppo.training.optim import state_tensors
from hydra_ppo.training.ppo import PPOTrainer, with_advantages

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
        torch.manual_seed(0)
        self.model = HydraModel.from_config(
            LlamaConfig(
                vocab_size=sizes.vocabulary,
                hidden_size=sizes.hidden,
                intermediate_size=4 * sizes.hidden,
                num_hidden_layers=sizes.layers,
                num_attention_heads=4,
                max_position_embeddings=sizes.prompt_tokens + sizes.response_tokens,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            device="cpu",
        )
        self.model.enable_checkpointing()
        self.model.reward_head_trained = True  # its scores need no meaning here, and the trainer asks
        self.config = PPOConfig(
            model=ModelSettings(name_or_path="unused"),
            data=DataSettings(train="unused"),
            run=RunSettings(output="unused", memory="never"),
            rollout=RolloutSettings(
                batch_size=sizes.prompts, max_new_tokens=sizes.response_tokens, score_batch_size=sizes.microbatch
            ),
            optimizer=OptimizerSettings(learning_rate=1e-5),
            ppo_epochs=1,
            minibatch_size=sizes.prompts,
            microbatch_size=sizes.microbatch,
        )
        ids = torch.randint(3, sizes.vocabulary, (sizes.prompts, sizes.prompt_tokens)).tolist()
        self.prompts: Sequence[Sequence[int]] = ids
        self.trainer = PPOTrainer(self.model, _tokenizer(), self.config, [PromptRow("", tuple(row)) for row in ids])
        self.eos_ids = [sizes.vocabulary]  # a token that there is not, so that all responses are of full length
        self.experience = self.collect()

    def collect(self) -> Experience:
        """Sample and score, and fill in the advantages."""
        found = collect_experience(
            self.model, self.prompts, self.config.rollout, eos_ids=self.eos_ids, pad_id=0, generator=_generator()
        )
        assert found.scores is not None
        return with_advantages(found, found.scores, self.config, self.config.kl.coef)

    def sample(self) -> Samples:
        """Sample the responses: always the same."""
        return sample(self.model, self.prompts, self.config.rollout, self.eos_ids, _generator())

    def score(self) -> Experience:
        """Do the two scoring passes over responses that are there already."""
        return score(self.model, self.experience, self.config.rollout)

    def update(self) -> dict[str, float | None]:
        """Do forward and backward passes of actor and critic, and one optimizer step."""
        return self.trainer.update(self.experience)

    def alive(self) -> list[Tensor]:
        """Return the tensors that outlive a phase: model, optimizer state, experience."""
        held = [*self.model.parameters(), *self.model.buffers(), *state_tensors(self.trainer.optimizer)]
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


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return one that knows the special tokens, which is all that the trainer asks of it here."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )
