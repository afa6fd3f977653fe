"""verl's engines of backend `hydra`: actor, reference and critic of a process on one base.

Written against verl 0.9.1: `verl.workers.engine.base.BaseEngine` says what an engine answers, its FSDP engine what numbers
mean: losses are scaled for an average over ranks, a number of token t stands at t - 1, what is not finite is no step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import LoraConfig, TaskType
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from verl.utils.fsdp_utils import load_fsdp_optimizer, offload_fsdp_optimizer, replace_lora_wrapper
from verl.utils.torch_functional import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine.base import BaseEngine, BaseEngineCtx
from verl.workers.engine.utils import enable_full_determinism, postprocess_batch_func, prepare_micro_batches

from hydra_ppo.experience import Sequences
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import quantization_of
from hydra_ppo.model.quantized_embeddings import embeddings_kind
from hydra_ppo.patches import verl_rules
from hydra_ppo.patches.verl_base import Shared, average_gradients, build, join
from hydra_ppo.patches.verl_files import Files, adapter_tensors
from hydra_ppo.patches.verl_rows import Rows, by_temperature, refuse_batch, temperatures_of
from hydra_ppo.patches.versions import HostError

logger = logging.getLogger("hydra_ppo")

LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]


class HydraEngine(BaseEngine):
    """What actor, reference and critic have in common.

    The actor's engine builds the base; the others wait for it, and stand on it from their first use on: verl makes the critic
    before the actor.

    Args:
        model_config, engine_config, optimizer_config, checkpoint_config: HFModelConfig, FSDPEngineConfig, FSDPOptimizerConfig
            and CheckpointConfig of verl.

    Raises:
        HostError: for a setting that does not go together with a shared base.

    Memory: the base once for all engines of a process; per role a LoRA adapter, its gradients and what the optimizer keeps.
    """

    role = "actor"

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        super().__init__()
        self.model_config, self.engine_config = model_config, engine_config
        self.optimizer_config, self.checkpoint_config = optimizer_config, checkpoint_config
        if engine_config.forward_only and self.role == "actor":
            self.role = "reference"
        verl_rules.refuse(self.role, model_config, engine_config, checkpoint_config)
        self.settings = verl_rules.read(self.role, model_config, engine_config)
        if engine_config.full_determinism:
            enable_full_determinism(seed=engine_config.seed)
        self.mode: str | None = None
        self.current = self.role
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.trains = not engine_config.forward_only
        self._ready = False
        self._shared: Shared | None = None

    # -- the model -----------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Load the base, where this is the actor's engine; the others wait for it.

        Raises:
            HostError: when called again.
        """
        if self._shared is not None:
            raise HostError(f"{self.role}: initialize was called again, and the base is loaded once; start a new process.")
        if self.role == "actor":
            self._take(build(self.settings, self.device))

    def stand(self) -> HydraModel:
        """Return the base of this process, on which the engine stands from its first use on.

        Raises:
            HostError: where no actor has built it.
        """
        if self._shared is None:
            self._take(join(self.role, self.settings))
        assert self._shared is not None
        return self._shared.model

    def _take(self, shared: Shared) -> None:
        self._shared = shared
        model = shared.model
        self.parameters: list[nn.Parameter] = []
        parts: dict[str, Any] = {}
        if self.trains:
            self.parameters = list(model.role_parameters(self.role).values())
            self.optimizer = build_optimizer(self.parameters, self.optimizer_config)
            self.schedule = self._build_schedule()
            enabled = self.settings.dtype == "fp16"
            self.scaler = torch.amp.GradScaler(self.device.type, growth_interval=400, enabled=enabled)
            parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        config = self.checkpoint_config
        saved, loaded = (verl_rules.found(config, f"{kind}_contents", None) for kind in ("save", "load"))
        tokenizer = self.model_config.get_processor() if hasattr(self.model_config, "get_processor") else None
        everything = verl_rules.SAVED
        self.files = Files(self.role, model, parts, saved or everything, loaded or everything, tokenizer)
        self._ready = True

    def _build_schedule(self) -> Any:
        config = self.optimizer_config
        warmup = config.lr_warmup_steps
        if warmup is None or warmup <= 0:
            warmup = int(config.lr_warmup_steps_ratio * config.total_training_steps)
        if config.lr_scheduler_type == "constant":
            return get_constant_schedule_with_warmup(optimizer=self.optimizer, num_warmup_steps=warmup)
        return get_cosine_schedule_with_warmup(
            optimizer=self.optimizer,
            num_warmup_steps=warmup,
            num_training_steps=config.total_training_steps,
            min_lr_ratio=config.min_lr_ratio,
            num_cycles=config.num_cycles,
            zero_indexed_step=config.zero_indexed_step,
        )

    # -- processes -----------------------------------------------------------------------------------------------------

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        """Every rank has numbers of its own rows."""
        return True

    # -- modes ---------------------------------------------------------------------------------------------------------

    @property
    def is_param_offload_enabled(self) -> bool:
        return False

    @property
    def is_optimizer_offload_enabled(self) -> bool:
        return bool(self.engine_config.optimizer_offload) and self.trains

    def train_mode(self, **kwargs: Any) -> AbstractContextManager[Any]:
        """Return a context in which steps are taken; gradients are dropped at its end."""
        self.stand()
        return _TrainMode(self, "train", **kwargs)

    def eval_mode(self, **kwargs: Any) -> AbstractContextManager[Any]:
        """Return a context for passes without gradients, which compute the same numbers."""
        self.stand()
        return _EvalMode(self, "eval", **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the reference inside the block.

        Raises:
            HostError: on the critic, which has none.
        """
        if self.role == "critic":
            raise HostError("no_lora_adapter=True was asked of the critic, which is no reference; ask the actor.")
        before, self.current = self.current, "reference"
        try:
            yield
        finally:
            self.current = before

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Move what the optimizer keeps to `cpu`, or back; the base stays where it is.

        Raises:
            HostError: when the base is to leave its device.
        """
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if model and torch.device(device).type != self.device.type:
            raise HostError(f"to({device!r}) would move the base, which every role runs on; move the optimizer alone.")
        if optimizer and self.trains and self._ready:
            if torch.device(device).type == "cpu":
                offload_fsdp_optimizer(self.optimizer)
            else:
                load_fsdp_optimizer(self.optimizer, self.device)

    # -- passes --------------------------------------------------------------------------------------------------------

    def forward_backward_batch(self, data: Any, loss_function: LossFunction | None, forward_only: bool = False) -> Any:
        """Run the rows of this rank, micro-batch by micro-batch, and add up gradients unless `forward_only`.

        Args:
            data: TensorDict with jagged rows; verl's trainers say in it how it is cut and what is wanted.
            loss_function: verl's; None only for passes without gradients.

        Returns:
            model_output (jagged; log_probs and entropy, or values), losses and metrics, as verl's other engines.
        """
        refuse_batch(data)
        model, group = self.stand(), self.get_data_parallel_group()
        tokens = data["loss_mask"].sum().to(self.device)
        dist.all_reduce(tokens, group=group)
        world = self.get_data_parallel_size()
        tu.assign_non_tensor(data, batch_num_tokens=tokens.item(), dp_size=world, sp_size=1)
        keep = forward_only or tu.get_non_tensor_data(data=data, key="return_model_output", default=False)
        micro_batches, indices = prepare_micro_batches(data=data, dp_group=group, same_micro_num_in_dp=True)
        outputs = []
        for micro in micro_batches:
            with torch.no_grad() if forward_only else nullcontext(), model.role(self.current):
                micro = micro.to(self.device)
                found = self.outputs(model, micro)
                loss, metrics = torch.ones((), device=self.device), {}
                if loss_function is not None:
                    loss, metrics = loss_function(model_output=found, data=micro, dp_group=group)
                if not forward_only:
                    self.scaler.scale(loss).backward()
            kept = {name: values.detach() for name, values in found.items()} if keep else {}
            outputs.append({"model_output": kept, "loss": loss.detach().item(), "metrics": metrics})
        return postprocess_batch_func(output_lst=outputs, indices=indices, data=data)

    def outputs(self, model: HydraModel, micro: Any) -> dict[str, Tensor]:
        """Return log-probs, and entropy where it is asked for, of the response tokens in the role in force, jagged (B, j)."""
        rows = Rows(micro)
        wanted = tu.get_non_tensor_data(data=micro, key="calculate_entropy", default=False)
        temperatures = temperatures_of(micro, len(rows.sequences.input_ids))

        def logprobs(sequences: Sequences, temperature: float) -> Any:
            return model.logprobs(sequences, temperature, entropy_grad=wanted and torch.is_grad_enabled())

        values, entropy = by_temperature(logprobs, rows.sequences, temperatures)
        return {"log_probs": rows.back(values)} | ({"entropy": rows.back(entropy)} if wanted else {})

    # -- steps ---------------------------------------------------------------------------------------------------------

    def optimizer_zero_grad(self) -> None:
        if self.trains:
            self.optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self) -> float:
        """Average gradients over ranks, clip them and take a step, unless they are not finite.

        Returns:
            Their norm before the clip.
        """
        average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimizer_config.clip_grad).item()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # which looks for itself
            self.scaler.update()
        elif norm - norm == 0:  # finite
            self.optimizer.step()
        else:
            logger.warning("%s: the gradient's norm is %s, so no step is taken", self.role, norm)
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def lr_scheduler_step(self) -> float:
        """Go on in the schedule and return the learning rate."""
        self.schedule.step()
        return float(self.schedule.get_last_lr()[0])

    # -- files and rollouts --------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **_: Any,
    ) -> None:
        """Write what this role has trained; `verl_files` has the names.

        Raises:
            HostError: for a place on HDFS.
            CheckpointError: on every rank, where one could not write.
        """
        self._refuse_hdfs(local_path, hdfs_path)
        self.stand()
        self.files.save(Path(local_path), BaseCheckpointManager.get_rng_state(), max_ckpt_to_keep)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = True, **_: Any
    ) -> None:
        """Bring this role to what `save_checkpoint` wrote, to the last bit. No file is deleted.

        Raises:
            HostError: for a place on HDFS.
            CheckpointError: on every rank, where one could not read.
        """
        self._refuse_hdfs(local_path, hdfs_path)
        self.stand()
        state = self.files.load(Path(local_path))
        if state is not None:
            BaseCheckpointManager.load_rng_state(state)
        if self.is_optimizer_offload_enabled:
            self.to("cpu", model=False, optimizer=True, grad=False)

    @staticmethod
    def _refuse_hdfs(local_path: str, hdfs_path: str | None) -> None:
        if hdfs_path is not None or "://" in local_path:
            raise HostError(
                f"checkpoints go to a folder, not to {hdfs_path or local_path!r}; set trainer.default_hdfs_dir=null."
            )

    def get_per_tensor_param(
        self, layered_summon: bool = False, base_sync_done: bool | None = None, **_: Any
    ) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any] | None]:
        """Return what a rollout server needs to be the actor.

        Args:
            layered_summon: FSDP's; the adapter is whole here.
            base_sync_done: whether the server has the base, which it reads itself with rollout.load_format=safetensors. Where
                not, the base's weights are returned, once.

        Returns:
            The actor's adapter under PEFT's names, and its config.

        Raises:
            HostError: where whole weights are asked for that are not held whole, or of the critic.
        """
        if self.role == "critic":
            raise HostError("the critic's weights were asked for a rollout; ask the actor's engine.")
        if base_sync_done is None:
            raise HostError(
                "actor_rollout_ref.rollout.checkpoint_engine.backend sends whole weights without an adapter; use naive."
            )
        model = self.stand()
        config = cast(LoraConfig, model.base.peft_config["actor"])
        described = config.to_dict() | {"task_type": TaskType.CAUSAL_LM}
        if base_sync_done:
            return iter(adapter_tensors(model).items()), described
        held = quantization_of(model.causal_lm) or embeddings_kind(model.causal_lm)
        if held is not None:
            raise HostError(
                f"rollout.load_format=dummy waits for whole weights, but the base is held in {held}; use "
                "actor_rollout_ref.rollout.load_format=safetensors."
            )
        state = model.causal_lm.state_dict()
        plain = {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}
        return ((replace_lora_wrapper(name, config), value.detach()) for name, value in plain.items()), described

    def get_per_tensor_param_shard(self, **_: Any) -> Any:
        """Refuse: weights are sent as an adapter."""
        raise HostError("checkpoint_engine.backend=delta_sharded sends changed weights, and the base never changes; use naive.")

    get_per_tensor_param_delta_shard = get_per_tensor_param_shard


class HydraCritic(HydraEngine):
    """The critic, on the base of the actor."""

    role = "critic"

    def outputs(self, model: HydraModel, micro: Any) -> dict[str, Tensor]:
        """Return values of the states before the response tokens, jagged (B, j)."""
        rows = Rows(micro)
        return {"values": rows.back(model.values(rows.sequences))}


class _EvalMode(BaseEngineCtx):
    """What verl does around passes: it notes the mode and moves what the optimizer keeps."""


class _TrainMode(BaseEngineCtx):
    """Drops gradients at the end, too."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.zero_grad_on_exit or kind is not None:
            self.engine.optimizer_zero_grad()
        super().__exit__(kind, error, trace)
