"""What a run would do, found out without loading a weight: files, output folder, batch arithmetic."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.cli.model_check import check_contents
from hydra_ppo.cli.model_files import NOT_CHECKED, check_model, check_reachable
from hydra_ppo.cli.practice import sources
from hydra_ppo.cli.rollouts import check_servers
from hydra_ppo.config.settings import DataSettings, PPOConfig, SFTConfig
from hydra_ppo.data.rows import Loaded, check_rows, shared_prompts, split_held_out
from hydra_ppo.data.sources import is_hub_name
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.folder import check_output
from hydra_ppo.runtime.tables import print_table
from hydra_ppo.training.eight_bit import NAMES, check_available


@dataclass(frozen=True)
class Quantity:
    """One line of the batch arithmetic; None where the size of the data is not known."""

    name: str
    per_step: float | None
    total: float | None


def ppo_arithmetic(config: PPOConfig, prompts: int | None) -> list[Quantity]:
    """Count what a PPO run does, per PPO step and in all.

    Args:
        config: Settings; rows have at most P = ``data.max_prompt_tokens`` prompt and
            R = ``rollout.max_new_tokens`` response tokens.
        prompts: Training prompts available; None where not known.

    Micro-batches are counted for rows of full length, so with ``microbatch_tokens`` they are an upper bound.
    Every optimizer step and micro-batch serves the actor and the critic; with ``target_kl`` the actor may sit some out.
    """
    rollout = config.rollout
    steps = None if config.epochs is not None and prompts is None else config.total_steps(prompts or 0)
    rows, width = rollout.batch_size, config.data.max_prompt_tokens + rollout.max_new_tokens
    micro_rows = config.microbatch_size
    if config.microbatch_tokens is not None:
        micro_rows = min(micro_rows, max(1, config.microbatch_tokens // width))
    minibatches = rows // config.minibatch_size * config.ppo_epochs
    micro_batches = minibatches * ceil(config.minibatch_size / micro_rows)
    decoded_together = min(rows, rollout.generation_batch_size or rows)
    copies = rollout.samples_per_prompt
    per_step = [
        ("prompts, each with one rollout" if copies == 1 else f"prompts, each with {copies} rollouts", rows // copies),
        ("batches decoded", ceil(rows / decoded_together)),
        ("minibatches = optimizer steps", minibatches),
        ("micro-batches" + (", at most" if config.microbatch_tokens else ""), micro_batches),
        ("tokens sampled, at most", rows * rollout.max_new_tokens),
        ("tokens in updates of each role, at most", rows * width * config.ppo_epochs),
    ]
    passes = None if not prompts else rows // copies / prompts

    def whole(count: float | None) -> float | None:
        return None if count is None or steps is None else count * steps

    return [Quantity("PPO steps", 1, steps)] + [
        Quantity(name, count, whole(count)) for name, count in [*per_step, ("passes over the prompts", passes)]
    ]


def sft_arithmetic(config: SFTConfig, pairs: int | None) -> list[Quantity]:
    """Count what a joint SFT run does, per optimizer step and in all.

    Args:
        config: Settings; each of the two sequences of a pair has at most ``data.max_prompt_tokens`` +
            ``data.max_response_tokens`` tokens.
        pairs: Training pairs available; None where not known. The last batch of an epoch may be smaller.
    """
    width = config.data.max_prompt_tokens + config.data.max_response_tokens
    batch, micro = config.batch_size, config.microbatch_size
    full = [batch, ceil(batch / micro), 2 * batch, 2 * batch * width]
    names = ["preference pairs", "micro-batches", "sequences (chosen and rejected)", "tokens, at most"]
    if config.has_floor:
        names[0] += f", {config.floor_pairs} of them floor pairs"
    steps: int | None = None
    totals: list[int | None] = [None] * len(names)
    if pairs:
        steps = config.steps(pairs)
        first = min(config.floor_steps, steps)
        steps_per_epoch = ceil(pairs / config.data_pairs)
        last = pairs - (steps_per_epoch - 1) * config.data_pairs
        last += config.floor_beside(last)
        epochs, rest = divmod(steps - first, steps_per_epoch)
        seen = epochs * ((steps_per_epoch - 1) * batch + last) + (rest + first) * batch
        per_epoch = (steps_per_epoch - 1) * full[1] + ceil(last / micro)
        totals = [seen, epochs * per_epoch + (rest + first) * full[1], 2 * seen, 2 * seen * width]
    elif config.max_steps is not None:
        steps = config.max_steps  # the data may end before that
    return [Quantity("optimizer steps", 1, steps)] + [
        Quantity(name, count, total) for name, count, total in zip(names, full, totals, strict=True)
    ]


def check_data(
    data: DataSettings, kind: Literal["preferences", "prompts"], margins: bool = False
) -> tuple[Loaded[Hashable] | None, Loaded[Hashable] | None]:
    """Check the data files row by row and return what training and held-out source hold, before any split.

    ``margins``: whether each pair has to have one.

    A hub dataset is not read: None. So is the held-out source where no ``eval`` is given.

    Raises:
        DataError: See ``hydra_ppo.data.rows.check_rows``.
    """
    found = [
        None if source is None or is_hub_name(source) else check_rows(source, kind, data, split=split, margins=margins)
        for source, split in ((data.train, data.split), (data.eval, data.eval_split))
    ]
    return found[0], found[1]


def check_prompts(config: SFTConfig, prompts: list[Hashable]) -> None:
    """Refuse answers to other prompts where there are none; what other corruptions make of the data shows in its tokens.

    Raises:
        ConfigError: as the run does before it reads a weight.
    """
    if config.has_floor and "other-prompt" in config.floor_kinds and len(set(prompts)) < 2:
        raise ConfigError(f"floor_kinds={config.floor_kinds}: 'other-prompt' changes no answer of data.train; leave it out.")


def check_reward_sources(config: PPOConfig) -> list[tuple[str, str]]:
    """Check what judges answers, in training and in evaluation; return what was found, by setting.

    Raises:
        ConfigError: naming the source.
    """
    from hydra_ppo.rewards.scorer import check_source

    found = []
    for setting, source in config.named_sources():
        name = f"{setting}.target"
        if source.kind == "classifier" and source.target:
            if (Path(source.target) / "hydra.json").is_file():
                raise ConfigError(
                    f"{name}={source.target!r} is a run of this program, not a classifier; name what hydra-ppo export --role "
                    "reward makes of it."
                )
            found.append((name, check_model(name, source.target)))
            check_reachable(name, source.target)
            check_source(source, config.reward.isolation)
        elif source.kind == "head" and source.target:
            check_source(source, config.reward.isolation)
            found.append((name, "heads found, of this model's states"))
        elif source.kind == "http" and source.target:
            check_source(source, config.reward.isolation)
            found.append((name, "address of a server; it is not asked"))
        elif source.kind == "function" and source.target:
            package = source.target.split(":")[0].split(".")[0]
            here = Path(package).is_dir() or Path(f"{package}.py").is_file()
            if not here and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"{name}={source.target!r} names no installed package {package!r}; correct the module's name."
                )
            check_source(source, config.reward.isolation)
            found.append((name, "function found; it is not called"))
    return found


def check_files(config: SFTConfig | PPOConfig) -> list[tuple[str, str]]:
    """Check device, model and reward sources as far as that needs no weights; return what was found, by setting.

    A reward function's module is imported, the function is not called.

    Raises:
        ConfigError: The first thing that would stop the run.
    """
    check_device(config)
    found = [("model.name_or_path", check_model("model.name_or_path", config.model.name_or_path))]
    check_reachable("model.name_or_path", config.model.name_or_path)
    found += check_contents(config)
    return found + check_reward_sources(config) + check_servers(config) if isinstance(config, PPOConfig) else found


def check_device(config: SFTConfig | PPOConfig) -> None:
    """Refuse what is no device, and an optimizer that it cannot have.

    Raises:
        ConfigError: naming the setting.
    """
    device = config.model.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"model.device={device!r} is not a device; use auto, cpu, cuda or cuda:N.")
    check_available(config.optimizer.name, _device_type(device, config.optimizer.name))


def _device_type(device: str, optimizer: str) -> str | None:
    """Return the type of device that will train; None where no check of the optimizer asks, which spares the import."""
    if optimizer not in NAMES:
        return None
    from hydra_ppo.model.loading import resolve_device

    return resolve_device(device).type


def dry_run(config: SFTConfig | PPOConfig, console: Console | None = None, *, resume: bool = False) -> None:
    """Check files and output folder, and print what the run would do.

    Raises:
        ConfigError, DataError: The first thing that would stop the run.
    """
    console = console or Console()
    command = "ppo" if isinstance(config, PPOConfig) else "sft"
    kind: Literal["preferences", "prompts"] = "prompts" if isinstance(config, PPOConfig) else "preferences"
    found = check_files(config)
    margins = isinstance(config, SFTConfig) and config.reward_loss == "margin"
    checked, checked_eval = check_data(config.data, kind, margins)
    if isinstance(config, SFTConfig) and checked is not None:
        check_prompts(config, checked.rows)
    train = None if checked is None else len(checked.rows)
    found.append(("data.train", _rows(checked, kind)))
    if config.data.eval is not None:
        shared = 0 if checked is None or checked_eval is None else shared_prompts(checked.rows, checked_eval.rows)
        again = f"; {shared:,} have a prompt that data.train has too" if shared else ""
        found.append(("data.eval", _rows(checked_eval, kind) + again))
    elif checked is not None:
        split = split_held_out(checked.rows, config.data.eval_fraction, config.run.seed)
        train, held_out = len(split[0]), len(split[1])
        found.append(("held out", f"{held_out:,} of them, {train:,} to train on"))
    for name, source in (sources(config) if isinstance(config, PPOConfig) else {}).items():
        rows, _ = check_data(replace(config.data, train=source, eval=None), "preferences")
        found.append((f"{name}.data", _rows(rows, "preferences")))
    found.append(("run.output", f"{check_output(config.run, config, command=command, resume=resume)} can be written"))
    example: Table | None = None  # made before anything is printed: what stops the run is one line
    if Path(config.model.name_or_path).is_dir():
        from hydra_ppo.cli.example_row import example_table
        from hydra_ppo.cli.loading import check_vocabulary, load_tokenizer

        tokenizer = load_tokenizer(config.model)
        check_vocabulary(tokenizer, config.model)
        example = example_table(config, tokenizer)
    files = Table(title="Checked (no weights loaded)", title_justify="left")
    files.add_column("setting")
    files.add_column("found", overflow="fold")
    for name, text in found:
        files.add_row(name, Text(text))
    print_table(console, files)
    if example is not None:
        print_table(console, example)
    arithmetic = ppo_arithmetic(config, train) if isinstance(config, PPOConfig) else sft_arithmetic(config, train)
    print_table(console, arithmetic_table(arithmetic))


def arithmetic_table(quantities: list[Quantity]) -> Table:
    """Lay out the batch arithmetic; "-" where the number is not known."""
    table = Table(title="Batch arithmetic", title_justify="left")
    table.add_column("quantity")
    table.add_column("per step", justify="right")
    table.add_column("whole run", justify="right")
    for quantity in quantities:
        table.add_row(quantity.name, _count(quantity.per_step), _count(quantity.total))
    return table


def _rows(checked: Loaded[Hashable] | None, kind: str) -> str:
    if checked is None:
        return NOT_CHECKED.replace("folder", "file")
    left_out = "".join(f"; {count:,} left out: {reason}" for reason, count in checked.reasons.items())
    return f"{len(checked.rows):,} rows of {kind}, format checked{left_out}"


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"
