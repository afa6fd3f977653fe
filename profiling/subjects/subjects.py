"""What is put under the tracker: the trainers of this package on models with random weights, and one step of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import nn

from hydra_ppo.config.settings import LoraSettings, OptimizerSettings, PPOConfig, PtxSettings, RolloutSettings, SFTConfig
from hydra_ppo.data.rows import PreferenceRow, PromptRow
from hydra_ppo.model.heads import HeadPlan
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import DTYPES, base_from_config
from hydra_ppo.model.roles import Role, Stage, build_stage
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.profiling.subjects.baselines import SeparateModels, build, drop_lm_head
from hydra_ppo.profiling.subjects.fake import LeapingDecoder, fake_base
from hydra_ppo.profiling.subjects.stand_ins import NoTokenizer, unused_settings
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.training.away import send_away
from hydra_ppo.training.joint_sft import JointSFTTrainer
from hydra_ppo.training.ppo import PPOTrainer

Models = HydraModel | SeparateModels

REWARD_STAGES = {
    "full": Stage("base", {"reward": Role(None, "reward")}, ("reward",), tunes_base=True),
    "lora": Stage("reward", {"reward": Role("reward", "reward")}, ("reward",)),
}
"""The two ways to train a reward model that PE-RLHF compares (Sidahmed et al. 2024, arXiv 2403.10704, section 3.1)."""


@dataclass(frozen=True)
class Subject:
    """A trainer that is ready to take steps.

    Attributes:
        optimizer: that it trains with.
        step: takes one whole step.
        warm_up: leaves the optimizer state that later steps meet, and changes no weight.
    """

    optimizer: torch.optim.Optimizer
    step: Callable[[], Any]
    warm_up: Callable[[], Any]


@dataclass(frozen=True)
class Builder:
    """Builds models and trainer of one method.

    Attributes:
        workload: model and sizes.
        config: Hugging Face config of the model.
        method: of the stage.
        stage: ppo, reward (the reward model alone) or sft (SFT model and reward model jointly).
        place: device of a real run.
        simulate: use fake tensors.
        decoder: what decodes; None is the usual one, in a simulation the one that leaps.
        world: the processes that share the work out.
    """

    workload: Workload
    config: Any
    method: str
    stage: str
    place: torch.device
    simulate: bool
    decoder: type[Decoder] | None = None
    world: World = ALONE

    def models(self) -> Models:
        """Build the models of the method, random weights, checkpointing as asked for."""
        if self.stage == "ppo":
            model = build(self.method, self._base) if self._is_plain else self._base(build_stage(self._settings().stage, {}))
        elif self.stage == "sft":
            model = self._base(build_stage("base" if self.method == "full" else "sft", {}))
        else:
            model = self._base(REWARD_STAGES[self.method])
            drop_lm_head(model)
        model.enable_checkpointing(self.workload.checkpointing, offload=self.workload.checkpoint_offload)
        return model

    def _base(self, stage: Stage) -> HydraModel:
        workload = self.workload
        if self.simulate:
            dtype, embeddings, shard = DTYPES[workload.dtype], workload.quantize_embeddings, workload.shard_base
            base = fake_base(self.config, workload.quantization, dtype, embeddings, shard)
        else:
            torch.manual_seed(0)
            base = base_from_config(
                self.config,
                quantization=workload.quantization,
                attention="auto",
                dtype=workload.dtype,
                device=str(self.place),
                quantized_embeddings=workload.quantize_embeddings,
                shard=workload.shard_base,
            )
        lora = LoraSettings(r=workload.rank, alpha=2 * workload.rank)
        # What checks a new model is no part of a step; that of an 8B in nf4 takes 0.2 GiB beside the base.
        model = HydraModel(
            base,
            lora=lora,
            train=stage,
            trunk_layers=workload.trunk_layers,
            check="off",
            tile_tokens=workload.tile_tokens,
            heads=HeadPlan(workload.reward_heads, workload.reward_loss == "advantage"),
        )
        model.reward_head_trained = True
        return model

    def subject(self, model: Models, on_phase: Callable[[str], None]) -> Subject:
        """Build the trainer around the models."""
        return (self._ppo if self.stage == "ppo" else self._pairs)(model, on_phase)

    def _ppo(self, model: Models, on_phase: Callable[[str], None]) -> Subject:
        workload = self.workload
        rows = workload.rollout_batch
        settings = self._settings()
        decoder = self.decoder or (LeapingDecoder if self.simulate else None)
        sampler = partial(sample, lengths=[workload.response] * rows, decoder=decoder)
        # No two alike, where there are tokens enough: a prompt that is sampled from several times is run once.
        prompts = [PromptRow("", _tokens(workload.prompt, row)) for row in range(rows)]
        # With given lengths no token ends a response, whichever the end token is.
        shared: dict[str, Any] = {"on_phase": on_phase, "world": self.world}
        if workload.ptx:
            answer = PreferenceRow("", "", "", _tokens(workload.prompt), _tokens(workload.response), ())
            shared["ptx"] = [answer] * (workload.minibatch or rows)
        trainer = PPOTrainer(model, NoTokenizer(end_token=0), settings, prompts, sampler=sampler, **shared)
        trainer.progress.batches = repeat(prompts)  # in this order: a fake permutation reads as one row again and again

        def warm_up() -> None:
            # A scaler makes its scale when it is first asked for one; only fp16 has a scaler that does anything.
            trainer.progress.scaler.scale(torch.zeros((), device=model.device))
            for roles in trainer.updates.turns:
                _zero_gradients(p for role in roles for p in trainer.updates.parameters[role])
                trainer.updates.optimizer_step(roles)
            if workload.offload_in_rollout:
                send_away(trainer.progress.optimizer)

        return Subject(trainer.progress.optimizer, partial(trainer.step, 1), warm_up)

    @property
    def _is_plain(self) -> bool:
        """Whether the models are those of the method's own table of roles."""
        return self.workload.advantage == "gae" and not self.workload.ema

    def _settings(self) -> PPOConfig:
        workload = self.workload
        rows = workload.rollout_batch
        return PPOConfig(
            **unused_settings(),
            rollout=RolloutSettings(
                batch_size=rows,
                max_new_tokens=workload.response,
                score_batch_size=workload.score_batch,
                kv_cache=workload.kv_cache,
                weights=workload.rollout_weights,
                samples_per_prompt=rows if workload.advantage in ("group", "rloo") else 1,
            ),
            advantage=workload.advantage,
            ema_decay=0.99 if workload.ema else None,
            ptx=PtxSettings(data="practised") if workload.ptx else PtxSettings(),
            ppo_epochs=1,
            minibatch_size=workload.minibatch or rows,
            microbatch_size=workload.microbatch,
            optimizer=OptimizerSettings(name=workload.optimizer, offload_in_rollout=workload.offload_in_rollout),
            update_order=workload.update_order,
        )

    def _pairs(self, model: Models, on_phase: Callable[[str], None]) -> Subject:
        workload = self.workload
        full, joint = self.method == "full", self.stage == "sft"
        settings = SFTConfig(
            **unused_settings(),
            method="full" if full else "lora",
            adapter="sft" if full or joint else "reward",
            sft_coef=1.0 if joint else 0.0,
            reward_coef=1.0,
            batch_size=workload.rollout_batch,
            microbatch_size=workload.microbatch,
            optimizer=OptimizerSettings(name=workload.optimizer),
            reward_heads=workload.reward_heads,
            reward_loss=workload.reward_loss,
        )
        prompt, response = _tokens(workload.prompt), _tokens(workload.response)
        other = tuple(token + 1 for token in response)  # which parts from it at once: most is read then
        rows = [PreferenceRow("", "", "", prompt, response, other, margin=0.0)] * workload.rollout_batch
        trainer = JointSFTTrainer(model, settings, rows, pad_token_id=0, on_phase=on_phase, world=self.world)
        taken = rows[: workload.microbatch] if self.simulate else rows

        def warm_up() -> None:
            _zero_gradients(p for group in trainer.optimizer.param_groups for p in group["params"])
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)

        return Subject(trainer.optimizer, partial(trainer.step, 0, taken), warm_up)


def _tokens(count: int, row: int = 0) -> tuple[int, ...]:
    """Return `count` tokens between 3 and 52; the last two spell the number of the row."""
    ending = (3 + row // 50 % 50, 3 + row % 50)
    return (tuple(3 + i % 50 for i in range(count)) + ending)[-count:]


def _zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
