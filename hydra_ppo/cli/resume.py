"""Whether a run may go on from a checkpoint: what it was then, what it is now, and what may differ."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.practice import sources
from hydra_ppo.config.paths import SOURCES
from hydra_ppo.config.reading import as_values, item_class, settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.data.ends import find_ends
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import file_digest, model_digests, model_folder, rows_digest, tokenizer_digest
from hydra_ppo.model.manifest import MANIFEST, base_folder
from hydra_ppo.parallel.environment import place
from hydra_ppo.rewards.isolated import file_of
from hydra_ppo.runs.checkpoint import Checkpoint, Position, newest_checkpoint, why_unlike
from hydra_ppo.runs.run import PACKAGES, version
from hydra_ppo.training.optim import rates_until
from hydra_ppo.training.ppo_update import optimizer_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.training.joint_sft import JointSFTTrainer
    from hydra_ppo.training.ppo import PPOTrainer

SINCE = ("watch",)
"""What trainers save that checkpoints of earlier versions lack; theirs is what a run begins with."""
LENGTHS = ("steps", "epochs", "max_steps")
FREE = (
    *LENGTHS,
    "sample_every",
    "eval_every",
    "reward.time_limit",
    "reward.isolation",
    "optimizer.offload_in_rollout",
    "model.checkpoint_offload",
    *(f"rollout.vllm.{name}" for name in ("urls", "model", "adapter_folder", "timeout", "retries")),
)
"""Settings that may change between two parts of a run, besides those of `monitor`, and of `run` other than its seed."""
ALIKE = {"optimizer.name": ("adamw", "adamw-offloaded")}
"""Values of a setting that give the same bits and checkpoints: one may take the other's place."""


def find_checkpoint(
    folder: Path, note: Callable[[str], None], before: Position | None = None, why: str | None = None
) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run folder; None where it holds none at all, and the run begins anew.

    Args:
        folder: of the run.
        note: gets a line on each that is passed over.
        before: only those of earlier positions.
        why: what was wrong with the one at that position.

    Raises:
        ConfigError: there are some, and none is whole.
    """
    damaged = [] if why is None else [why]
    found = newest_checkpoint(folder, damaged.append, before)
    for line in damaged:
        note(f"{line}; the one before it is used")
    if damaged and found is None:
        raise ConfigError(
            f"run.output={str(folder)!r} holds no checkpoint that is whole ({damaged[0]}); "
            "it is left as it is; put the checkpoint back, or start again in another folder."
        )
    return found


def why_unreadable(
    checkpoint: Checkpoint, model: HydraModel, trainer: PPOTrainer | JointSFTTrainer, like: Mapping[str, Any]
) -> str | None:
    """Bring model and trainer to a checkpoint; say what is wrong with it where that fails, whatever its seal says.

    Args:
        like: what a trainer that has not begun would save.
    """
    from safetensors import SafetensorError

    from hydra_ppo.model.saving import read_trained

    try:
        state = checkpoint.state()
        state.values = {name: like[name] for name in SINCE if name in like} | state.values
        problem = why_unlike(state.values, like)
        if problem is None:
            read_trained(model, checkpoint.folder)
            trainer.load(state)
            if trainer.position != checkpoint.position:
                problem = f"its trainer has come to {trainer.position}"
    except (ConfigError, OSError, SafetensorError) as error:
        problem = str(error)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, AssertionError) as error:
        problem = f"its state cannot be taken over ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    return None if problem is None else f"checkpoints/{checkpoint.folder.name} is damaged: {problem.rstrip('.')}"


def describe_run(
    config: SFTConfig | PPOConfig, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Any], eval_rows: Iterable[Any]
) -> dict[str, Any]:
    """Return what a run is: settings, and digests of model files, tokenizer and data. Plain values."""
    rows = list(rows)
    digests = _digests("model", config.model.name_or_path)
    folder = model_folder(config.model.name_or_path)
    if folder is not None and (folder / MANIFEST).is_file():
        digests |= _digests("base", base_folder(folder))
    if config.model.adapter is not None:
        digests |= _digests("adapter", config.model.adapter)
    for setting, source in config.named_sources() if isinstance(config, PPOConfig) else []:
        if source.kind in ("classifier", "head") and source.target is not None:
            digests |= _digests(setting, source.target)
    for kind, data in (sources(config) if isinstance(config, PPOConfig) else {}).items():
        if Path(data).is_file():  # a name on the hub is a setting like others
            digests[kind] = file_digest(Path(data))
    digests["tokenizer"] = tokenizer_digest(tokenizer)
    digests["the end of an answer"] = str(find_ends(tokenizer, end_of_turn=config.data.end_of_turn).turn)
    digests["data"] = rows_digest(rows, eval_rows)
    steps = config.total_steps(len(rows)) if isinstance(config, PPOConfig) else config.steps(len(rows))
    return {
        "config": as_values(config),
        "steps": steps,
        "optimizer_steps": optimizer_steps(config, len(rows)) if isinstance(config, PPOConfig) else steps,
        "digests": digests,
        "reward_functions": _reward_functions(config) if isinstance(config, PPOConfig) else {},
        "surroundings": _surroundings(),
    }


def _surroundings() -> dict[str, str]:
    """Return what sums are rounded by, besides the run: versions of libraries, threads, GPU."""
    import torch

    found = {name: version(name) or "not installed" for name in ("hydra-ppo", *PACKAGES)}
    found["threads"] = str(torch.get_num_threads())
    found["WORLD_SIZE"] = str(place().size)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _digests(what: str, name_or_path: str) -> dict[str, str]:
    """Return digests of the files of a model, after a word of what it is; none where they are not on this machine yet."""
    folder = model_folder(name_or_path)
    return {} if folder is None else {f"{what} {name}": digest for name, digest in model_digests(folder).items()}


def _without_known_paths(values: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return settings without the paths of what digests tell apart: where it lies, and how it is named, is free."""
    known = {name.split(" ")[0] for name in digests}
    changed = deepcopy(dict(values))
    told_apart = {"model.name_or_path": "model", "model.adapter": "adapter", "data.train": "data", "data.eval": "data"}
    told_apart |= {"ptx.data": "ptx", "rehearsal.data": "rehearsal"}
    for name, what in told_apart.items():
        group, _, setting = name.partition(".")
        if what in known and isinstance(inner := changed.get(group), dict):
            inner[setting] = None
    for setting in SOURCES:
        sources = _at(changed, setting)
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if f"{setting}[{index}]" in known and isinstance(source, dict):
                source["target"] = None
    return changed


def _reward_functions(config: PPOConfig) -> dict[str, str]:
    """Return digests of the modules that reward functions stand in, by target; of those that have a source."""
    targets = [source.target for _, source in config.named_sources() if source.kind == "function" and source.target]
    found = {}
    for target in targets:
        if config.reward.isolation == "process":  # which imports it, and this process does not
            source = file_of(target)
        else:
            source = getattr(sys.modules.get(target.split(":")[0]), "__file__", None)
        if source is not None:
            found[target] = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:32]
    return found


def check_unchanged(checkpoint: Checkpoint, config: SFTConfig | PPOConfig, now: Mapping[str, Any]) -> list[str]:
    """Refuse to go on where the result would not be that of one run; return lines on what may have changed.

    Raises:
        ConfigError: with the list of all differences.
    """
    before = checkpoint.run
    old, new = (_without_known_paths(run["config"], run["digests"]) for run in (before, now))
    found = []
    for name, setting in settings_of(type(config)).items():
        # What was no setting yet when the checkpoint was written did what its default does now.
        was, is_ = _at(old, name, None if setting.required else setting.default), _at(new, name)
        was = _whole_items(was, setting.hint)
        alike = ALIKE.get(name, ())
        if was != is_ and not is_free(name) and not (was in alike and is_ in alike):
            found.append(f"{name} was {was!r}, is {is_!r}")
    for name in sorted(before["digests"].keys() | now["digests"].keys()):
        if before["digests"].get(name) != now["digests"].get(name):
            what = "changed" if name in before["digests"] and name in now["digests"] else "is missing or new"
            found.append(f"{name} {what}")
    if not found:
        found = _length_problems(checkpoint, config, now)
    if found:
        raise ConfigError(
            f"run.output={config.run.output!r} cannot go on from {checkpoint.folder.name}: {'; '.join(found)}. "
            "Put that back, or start a new run in another folder."
        )
    was = before.get("surroundings", {})
    others = [f"{name} was {was[name]}, is {is_}" for name, is_ in now["surroundings"].items() if was.get(name, is_) != is_]
    said = [f"{', '.join(others)} since {checkpoint.folder.name}: the rest may differ in the last bits"] if others else []
    return said + [
        f"the module of the reward function {target} has changed since {checkpoint.folder.name}: scores before and after may "
        "differ"
        for target, digest in before.get("reward_functions", {}).items()
        if now["reward_functions"].get(target, digest) != digest
    ]


def _length_problems(checkpoint: Checkpoint, config: SFTConfig | PPOConfig, now: Mapping[str, Any]) -> list[str]:
    """Say why the new length does not fit: fewer steps than are done, or other learning rates in those."""
    done, part = checkpoint.position
    total = now["steps"]
    if total < done + (part > 0):
        return [f"{done + (part > 0)} steps are done or begun, more than the {total} asked for"]
    before, after = checkpoint.run["optimizer_steps"], now["optimizer_steps"]
    steps = done + 1 if not isinstance(config, PPOConfig) else done * (after // total) + part + 1
    if total > done and rates_until(config.optimizer, before, steps) != rates_until(config.optimizer, after, steps):
        return [
            f"a run of {after} optimizer steps has other learning rates from the start than one of {before} "
            f"(optimizer.schedule={config.optimizer.schedule!r}, optimizer.warmup_fraction={config.optimizer.warmup_fraction})"
        ]
    return []


def _whole_items(value: Any, hint: Any) -> Any:
    """Return a list of small groups, such as reward.sources, in which what was no setting yet has its default."""
    kind = item_class(hint)
    if kind is None or not isinstance(value, list):
        return value
    defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    return [defaults | item if isinstance(item, dict) else item for item in value]


def is_free(name: str) -> bool:
    """Say whether a setting may change between two parts of a run."""
    return name in FREE or name.startswith("monitor.") or (name.startswith("run.") and name != "run.seed")


def _at(values: Any, name: str, missing: Any = None) -> Any:
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return missing
        values = values[part]
    return values
