"""One PPO update beside TRL 1.12's with LoRA on policy and value model: at equal work, and within an equal budget of memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from hydra_ppo.model.loading import DTYPES
from hydra_ppo.profiling.subjects.subjects import Builder
from hydra_ppo.profiling.validate.parts import NotRun, require
from hydra_ppo.profiling.validate.speed import free, weights_made_on
from hydra_ppo.profiling.workload import Workload

COUNTED = 2
"""Updates of each that are timed, after one that warms up."""
GIB = 2**30
BUDGET_GIB = 24
"""The card that both have to do with."""


def check_trl(workload: Workload, config: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time as many updates of ours and of TRL's: same rows, lengths, micro-batches, ranks, epochs; nothing is recomputed.

    Args and raises: as `memory.check_memory`; NotRun too where TRL's PPOTrainer is not there. The seconds are not looked at.

    Returns:
        Of each seconds an update, responses per second and, on a GPU, the allocator's peak in bytes.
    """
    require(workload.quantization)
    _require_trl()
    sizes = replace(workload, checkpointing=False)
    found = {}
    for name, run in (("hydra", hydra_updates), ("trl", trl_updates)):
        found[name] = _measured(run, sizes, config, device)
    ratio = found["trl"]["seconds"] / found["hydra"]["seconds"]
    peaks = [found[name]["peak_bytes"] for name in ("hydra", "trl")]
    held = f"; peaks {peaks[0] / GIB:.2f} and {peaks[1] / GIB:.2f} GiB" if peaks[0] is not None else ""
    return {
        "settings": sizes.settings(),
        **found,
        "time_ratio": ratio,
        "passed": True,
        "summary": f"{found['hydra']['seconds']:.2f} s an update, TRL {found['trl']['seconds']:.2f} s: ratio {ratio:.2f}{held}",
    }


def check_budget(workload: Workload, config: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Find, for ours and for TRL's, the most responses a second within `BUDGET_GIB`: micro-batches are doubled while they fit.

    Args and raises: as `check_trl`; NotRun too on a CPU, which has no memory of its own to give up.
    """
    require(workload.quantization)
    _require_trl()
    if device.type != "cuda":
        raise NotRun("an equal budget of memory needs a GPU.")
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(1.0, BUDGET_GIB * GIB / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    found: dict[str, Any] = {}
    begun = time.perf_counter()
    try:
        for number, (name, run) in enumerate((("hydra", hydra_updates), ("trl", trl_updates)), 1):
            found[name] = {}
            micro = 1
            while micro <= workload.rollout_batch and time.perf_counter() - begun < seconds * number / 2:
                sizes = replace(workload, microbatch=micro, score_batch=micro, checkpointing=False)
                try:
                    found[name][str(micro)] = _measured(run, sizes, config, device)
                except torch.OutOfMemoryError:
                    break
                micro *= 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    best = {name: max((each["responses_per_second"] for each in tries.values()), default=0.0) for name, tries in found.items()}
    return {
        "settings": workload.settings(),
        "budget_bytes": BUDGET_GIB * GIB,
        "by_microbatch": found,
        "best_responses_per_second": best,
        "passed": best["hydra"] > 0,
        "summary": f"within {BUDGET_GIB} GiB {best['hydra']:.2f} responses/s, TRL "
        + (f"{best['trl']:.2f}" if best["trl"] else "does not fit"),
    }


def _require_trl() -> None:
    if find_spec("trl") is None or find_spec("trl.experimental") is None:
        raise NotRun("TRL is not installed here; pip install --no-deps trl==1.12.0.")


def _measured(
    run: Callable[[Workload, Any, torch.device], list[float]], workload: Workload, config: Any, device: torch.device
) -> dict[str, Any]:
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = run(workload, config, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    free(device)
    seconds = median(times[1:])
    return {
        "seconds": seconds,
        "seconds_of_each": times,
        "responses_per_second": workload.rollout_batch / seconds,
        "peak_bytes": peak,
    }


def hydra_updates(workload: Workload, config: Any, device: torch.device) -> list[float]:
    """Return the seconds of each update of ours."""
    with weights_made_on(device):
        builder = Builder(workload, config, "hydra", "ppo", device, False)
        model = builder.models()
    subject = builder.subject(model, lambda phase: None)
    return [_seconds(subject.step, device) for _ in range(COUNTED + 1)]


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    begun = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trl_updates(workload: Workload, config: Any, device: torch.device) -> list[float]:
    """Return the seconds of each update of TRL's trainer: LoRA on policy and value model, the reference without its adapter."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype = DTYPES[workload.dtype]
    shape = type(config).from_dict(config.to_dict())
    # Responses end and are padded with one past the vocabulary, which cannot be sampled: all have their whole length.
    shape.eos_token_id = shape.bos_token_id = shape.pad_token_id = None
    end = shape.vocab_size

    def lora(task: TaskType) -> LoraConfig:
        return LoraConfig(r=workload.rank, lora_alpha=2 * workload.rank, target_modules="all-linear", task_type=task)

    shape.num_labels = 1
    with device:
        policy = get_peft_model(AutoModelForCausalLM.from_config(shape, dtype=dtype), lora(TaskType.CAUSAL_LM))
        reward = AutoModelForSequenceClassification.from_config(shape, dtype=dtype)
        value = get_peft_model(AutoModelForSequenceClassification.from_config(shape, dtype=dtype), lora(TaskType.SEQ_CLS))
    for model in (reward, value):  # which look for padding in a batch
        model.config.pad_token_id = end
    rows = workload.rollout_batch
    # The last batch of its dataloader gets an optimizer step per micro-batch: one batch more than is counted.
    data = [{"input_ids": [3 + (row + i) % 50 for i in range(workload.prompt)]} for row in range(rows * (COUNTED + 2))]
    times: list[float] = []

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.begun = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **__: Any) -> Any:
            _wait(device)
            now = time.perf_counter()
            times.append(now - self.begun)
            self.begun = now
            if len(times) > COUNTED:
                raise _Enough
            return control

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=workload.microbatch,
                gradient_accumulation_steps=rows // workload.microbatch,
                num_mini_batches=1,
                num_ppo_epochs=1,
                local_rollout_forward_batch_size=workload.score_batch,
                response_length=workload.response,
                total_episodes=len(data),
                temperature=1.0,
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=device.type == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=SimpleNamespace(eos_token_id=end, pad_token_id=end),
            model=policy,
            ref_model=None,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            data_collator=lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])},
            callbacks=[Times()],
        )
        with suppress(_Enough):
            trainer.train()
    return times


class _Enough(Exception):
    """As many updates as are wanted are done."""
