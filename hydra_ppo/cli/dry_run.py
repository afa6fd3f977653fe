"""What a run would do, found out without loading a weight: files, output folder, batch arithmetic."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.config.settings import DataSettings, PPOConfig, SFTConfig
from hydra_ppo.data.rows import check_source, split_held_out
from hydra_ppo.data.sources import exists, local_path
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.folder import check_output

MIB = 2**20
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses more."""
NOT_CHECKED = "not a local folder: not checked, would be downloaded"


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
    rollout, steps = config.rollout, config.steps
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
    return [Quantity(name, count, count * steps) for name, count in per_step] + [
        Quantity("passes over the prompts", passes, None if passes is None else passes * steps)
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
    steps: int | None = None
    totals: list[int | None] = [None] * len(names)
    if pairs:
        steps_per_epoch = ceil(pairs / batch)
        steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
        epochs, rest = divmod(steps, steps_per_epoch)
        seen = epochs * pairs + rest * batch
        per_epoch = (steps_per_epoch - 1) * full[1] + ceil((pairs - (steps_per_epoch - 1) * batch) / micro)
        totals = [seen, epochs * per_epoch + rest * full[1], 2 * seen, 2 * seen * width]
    elif config.max_steps is not None:
        steps = config.max_steps  # the data may end before that
    return [Quantity("optimizer steps", 1, steps)] + [
        Quantity(name, count, total) for name, count, total in zip(names, full, totals, strict=True)
    ]


def check_model(setting: str, name_or_path: str) -> str:
    """Check the files of a model and say in a few words what was found.

    Raises:
        ConfigError: A path that does not exist, a folder without config or weights, or a file that is missing or torn.
    """
    path = Path(name_or_path)
    name = f"{setting}={name_or_path!r}"
    try:
        is_file = path.is_file()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}); check the path.") from None
    if is_file:
        raise ConfigError(f"{name} is a file; name the folder that holds it.")
    if not path.is_dir():
        if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
            raise ConfigError(f"{name} does not exist; check the path.")
        return NOT_CHECKED
    if (path / "hydra.json").is_file():
        return _check_saved_model(name, path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{name} holds neither config.json nor hydra.json; name a model folder or a run of sft or ppo.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{name} holds a broken {index.name}; copy the model again.") from None
        if missing := [shard for shard in shards if not (path / shard).is_file()]:
            raise ConfigError(f"{name} lacks {missing[0]} ({len(missing)} of {len(shards)} shards); copy the model again.")
    elif (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif list(path.glob("pytorch_model*.bin*")):
        raise ConfigError(f"{name} holds weights as pytorch_model.bin only; save them again as safetensors.")
    else:
        raise ConfigError(f"{name} holds config.json but no weights; add model.safetensors.")
    for shard in shards:
        check_weights(name, path / shard)
    size = sum((path / shard).stat().st_size for shard in shards)
    return f"local folder, {size / MIB:,.1f} MiB of weights"


def _check_saved_model(name: str, path: Path) -> str:
    try:
        manifest = json.loads((path / "hydra.json").read_text(encoding="utf-8"))
        base_name, relative = str(manifest["base"]["name_or_path"]), manifest["base"]["relative"]
        adapters, heads = [str(adapter) for adapter in manifest.get("adapters", [])], manifest.get("heads", [])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{name} holds a broken hydra.json; save the model again.") from None
    for adapter in adapters:
        _check_adapter(name, path, adapter)
    if heads:
        if not (path / "heads.safetensors").is_file():
            raise ConfigError(f"{name} lacks heads.safetensors; save the model again.")
        check_weights(name, path / "heads.safetensors", "save the model again")
    if not relative:
        return f"saved by this program; base {base_name}: {check_model('the base of ' + name, base_name)}"
    base_path = path / base_name
    if not base_path.is_dir():
        raise ConfigError(f"{name} needs its base at {base_name!r} beside it; put it back there.")
    return f"saved by this program; base: {check_model('the base of ' + name, str(base_path))}"


def _check_adapter(name: str, path: Path, adapter: str) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / adapter / file).is_file():
            raise ConfigError(f"{name} lacks {adapter}/{file}; save the model again.")
    try:
        json.loads((path / adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{name} holds a broken {adapter}/adapter_config.json; save the model again.") from None
    check_weights(name, path / adapter / "adapter_model.safetensors", "save the model again")


def check_weights(name: str, path: Path, remedy: str = "copy the model again") -> None:
    """Refuse a safetensors file that is shorter than its header says, or has none; no tensor is read.

    Raises:
        ConfigError: with ``name``, the file and ``remedy``.
    """
    size = path.stat().st_size
    needed = None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length <= LONGEST_HEADER:
            try:
                tensors = json.loads(file.read(length) or "{}")
                needed = 8 + length + max((v["data_offsets"][1] for k, v in tensors.items() if k != "__metadata__"), default=0)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                needed = 8 + length if 8 + length > size else None
    if needed is None:
        raise ConfigError(f"{name}: {path.name} is not safetensors; {remedy}.")
    if size < needed:
        raise ConfigError(f"{name}: {path.name} has {size:,} bytes of {needed:,} or more; {remedy}.")


def check_data(data: DataSettings, kind: Literal["preferences", "prompts"]) -> tuple[int | None, int | None]:
    """Check the data files row by row and return (training rows, held-out rows), as they are before any split.

    A hub dataset is not read: None. Held-out rows are None too where no ``eval`` source is given.

    Raises:
        DataError: See ``hydra_ppo.data.rows.check_source``.
    """
    counts: list[int | None] = []
    for source, split in ((data.train, data.split), (data.eval, data.eval_split)):
        if source is None or _is_hub_name(source):
            counts.append(None)
        else:
            options = {"skip_bad_rows": data.skip_bad_rows, "strict": data.degenerate_pairs == "error"}
            counts.append(check_source(source, kind, limit=None, split=split, **options))
    return counts[0], counts[1]


def _is_hub_name(source: str) -> bool:
    is_path = exists(local_path(source)) or Path(source).suffix in (".json", ".jsonl", ".parquet")
    return not is_path and source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def _check_reward_sources(config: PPOConfig) -> list[tuple[str, str]]:
    found = []
    for index, source in enumerate(config.reward.sources):
        name = f"reward.sources[{index}].target"
        if source.kind == "classifier" and source.target:
            found.append((name, check_model(name, source.target)))
        elif source.kind == "function" and source.target:
            package = source.target.split(":")[0].split(".")[0]
            here = Path(package).is_dir() or Path(f"{package}.py").is_file()
            if not here and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"{name}={source.target!r} names no installed package {package!r}; correct the module's name."
                )
            found.append((name, "package found; the function is not called"))
    return found


def check_files(config: SFTConfig | PPOConfig) -> list[tuple[str, str]]:
    """Check device, model and reward sources as far as that needs no weights; return what was found, by setting.

    Raises:
        ConfigError: The first thing that would stop the run.
    """
    device = config.model.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"model.device={device!r} is not a device; use auto, cpu, cuda or cuda:N.")
    found = [("model.name_or_path", check_model("model.name_or_path", config.model.name_or_path))]
    return found + _check_reward_sources(config) if isinstance(config, PPOConfig) else found


def dry_run(config: SFTConfig | PPOConfig, console: Console | None = None, *, resume: bool = False) -> None:
    """Check files and output folder, and print what the run would do.

    Raises:
        ConfigError, DataError: The first thing that would stop the run.
    """
    console = console or Console()
    command = "ppo" if isinstance(config, PPOConfig) else "sft"
    kind: Literal["preferences", "prompts"] = "prompts" if isinstance(config, PPOConfig) else "preferences"
    found = check_files(config)
    train, held_out = check_data(config.data, kind)
    found.append(("data.train", _rows(train, kind)))
    if config.data.eval is not None:
        found.append(("data.eval", _rows(held_out, kind)))
    elif train is not None:
        split = split_held_out(range(train), config.data.eval_fraction, config.run.seed)
        train, held_out = len(split[0]), len(split[1])
        found.append(("held out", f"{held_out:,} of them, {train:,} to train on"))
    found.append(("run.output", f"{check_output(config.run, config, command=command, resume=resume)} can be written"))
    files = Table(title="Checked (no weights loaded)", title_justify="left")
    files.add_column("setting")
    files.add_column("found", overflow="fold")
    for name, text in found:
        files.add_row(name, Text(text))
    console.print(files)
    arithmetic = ppo_arithmetic(config, train) if isinstance(config, PPOConfig) else sft_arithmetic(config, train)
    console.print(arithmetic_table(arithmetic))


def arithmetic_table(quantities: list[Quantity]) -> Table:
    """Lay out the batch arithmetic; "-" where the number is not known."""
    table = Table(title="Batch arithmetic", title_justify="left")
    table.add_column("quantity")
    table.add_column("per step", justify="right")
    table.add_column("whole run", justify="right")
    for quantity in quantities:
        table.add_row(quantity.name, _count(quantity.per_step), _count(quantity.total))
    return table


def _rows(count: int | None, kind: str) -> str:
    return NOT_CHECKED.replace("folder", "file") if count is None else f"{count:,} rows of {kind}, format checked"


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"
