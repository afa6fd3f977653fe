"""The optimizer and the run folder, as settings of both trainers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import expand_home, required, setting
from hydra_ppo.config.fields import fraction as _fraction
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive

DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = setting(1e-4, "Peak learning rate.")
    weight_decay: float = setting(0.0, "Decoupled weight decay.")
    beta1: float = setting(0.9, "Decay of AdamW's first moment.")
    beta2: float = setting(0.95, "Decay of AdamW's second moment.")
    eps: float = setting(1e-8, "AdamW's denominator offset.")
    max_grad_norm: float | None = setting(1.0, "Clip the gradient norm to this; null clips nothing.")
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "Learning rate after the warm-up.")
    warmup_fraction: float = setting(0.0, "Share of the optimizer steps over which the learning rate rises from 0.")
    name: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adamw-offloaded"] = setting(
        "adamw",
        "How AdamW keeps its moments: fp32 on the device; bitsandbytes' 8 bits (parameters of fewer than 4096 numbers stay "
        "fp32), paged by CUDA or not; or in host memory, a few MiB at a time on the device, with adamw's bits.",
    )
    offload_in_rollout: bool = setting(
        False, "ppo: keep the moments in host memory while responses are sampled and scored; the bits are the same."
    )

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "eps", "max_grad_norm")
        idle = self.name in ("paged-adamw-8bit", "adamw-offloaded")
        rule = f"has nothing to do with name={self.name!r}, whose moments are in host memory already"
        _check(self, "offload_in_rollout", not (self.offload_in_rollout and idle), rule, "leave it false")
        _not_negative(self, "weight_decay")
        _fraction(self, "warmup_fraction")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)", "choose for example 0.9")


@dataclass(frozen=True)
class RunSettings:
    """The run folder and what is written to it."""

    output: str = required("Run folder: config.yaml, metrics.jsonl, samples.jsonl, plots, adapters and heads go there.")
    seed: int = setting(0, "Seed of every random source.")
    overwrite: bool = setting(False, "Replace what an earlier run left in the output folder.")
    log_every: int = setting(1, "Write metrics every this many steps.")
    save_every: int = setting(50, "Write a checkpoint every this many steps; 0 writes only at the end.")
    keep_last: int = setting(2, "Newest checkpoints kept on disk.")
    keep_best: int = setting(1, "Checkpoints kept besides: those with the best held-out score (ppo) or loss (sft).")
    trackers: list[Literal["tensorboard", "wandb"]] = setting(list, "Also log to these, through accelerate.")
    project: str = setting("hydra-ppo", "Project name that the trackers show.")
    tracker_names: Literal["trl", "own"] = setting(
        "trl", "Names of PPO's numbers in the trackers: those of TRL where it logs the same, or those of metrics.jsonl."
    )
    memory: Literal["auto", "always", "never"] = setting(
        "auto", "Measure peak memory by phase: auto is every step on a GPU and the first two steps on a CPU."
    )
    progress: bool = setting(True, "Show progress (a bar, or lines where the output is no terminal) and sample tables.")
    max_time: str | None = setting(
        None,
        "Stop and save after this long, as on SIGTERM; --resume goes on, and its clock begins anew. 90s, 30m, 4h, 1d, 1h30m; "
        "null sets no limit.",
    )
    rank_timeout: float = setting(
        1800.0,
        "Where torchrun starts several processes: seconds that they wait for each other, such as for rewards, which rank 0 "
        "alone asks for.",
    )

    def __post_init__(self) -> None:
        expand_home(self, "output")
        _check(self, "output", bool(self.output), "is empty", "name a folder, for example runs/my-run")
        _positive(self, "log_every", "keep_last", "rank_timeout")
        _not_negative(self, "save_every", "keep_best", "seed")
        remedy = "write for example 30m, 4h or 1h30m"
        _check(self, "max_time", self.max_time is None or self.most_seconds is not None, "is no length of time", remedy)

    @property
    def most_seconds(self) -> float | None:
        """Seconds of `max_time`; None where it sets no limit."""
        found = None if self.max_time is None else DURATION.fullmatch(self.max_time.strip())
        if found is None or not any(found.groups()):
            return None
        parts = (float(part or 0) for part in found.groups())
        return sum(part * seconds for part, seconds in zip(parts, (86400, 3600, 60, 1), strict=True)) or None
