"""The one file of `hydra-ppo rlhf`: what its sections mean, as the configs of the stages."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra_ppo.cli.choices import ExportedRole
from hydra_ppo.cli.flags import parse
from hydra_ppo.config.evidence import Evidence, evidence
from hydra_ppo.config.fields import check, setting
from hydra_ppo.config.paths import MARK
from hydra_ppo.config.reading import as_values, build, flatten, nearest, nest, read_yaml
from hydra_ppo.config.settings import DataSettings, ModelSettings, PPOConfig, RunSettings, SFTConfig
from hydra_ppo.config.writing import render_yaml
from hydra_ppo.errors import ConfigError

STAGES = ("sft", "ppo", "evaluate", "export")
SHARED = ("model", "data", "run")
"""Groups of settings that both trainings have, and that are written once for both."""
KEYS = ("output", *SHARED, "sft", "ppo", "export")
CLASSES: dict[str, type[SFTConfig] | type[PPOConfig]] = {"sft": SFTConfig, "ppo": PPOConfig}
OURS = {"run.output": "where a stage writes", "run.overwrite": "what --overwrite says"}
"""Settings of a stage that this command sets itself, and why."""

Section = TypeVar("Section")


@dataclass(frozen=True)
class ExportSettings:
    """What is written for other programs at the end."""

    roles: list[ExportedRole] = setting(
        lambda: ["actor"], "Roles to export, each into a folder of its name: actor, reward, critic; none exports nothing."
    )
    adapter_only: bool = setting(False, "Write PEFT adapters alone, without the base.")
    dtype: str = setting("auto", "Type of the weights: auto, fp32, bf16 or fp16.")

    def __post_init__(self) -> None:
        known = ("auto", "fp32", "bf16", "fp16")
        check(self, "dtype", self.dtype in known, "is no type of weights", f"choose one of {', '.join(known)}")
        check(self, "roles", len(set(self.roles)) == len(self.roles), "names a role twice", "name each once")


@dataclass(frozen=True)
class Plan:
    """All stages of one file.

    Attributes:
        path: the file.
        output: folder of all stages.
        sft, ppo: their configs.
        export: what is exported.
    """

    path: Path
    output: Path
    sft: SFTConfig
    ppo: PPOConfig
    export: ExportSettings

    def folder(self, stage: str) -> Path:
        """Return where a stage writes."""
        return self.output / {"evaluate": "evaluation"}.get(stage, stage)


def read_plan(path: Path, flags: Mapping[str, Sequence[str]], output: Path | None = None) -> Plan:
    """Read the file and build the configs of all stages.

    Args:
        path: YAML.
        flags: `--NAME VALUE` flags of `sft` and `ppo`, which win over the file.
        output: in place of the file's.

    Raises:
        ConfigError: naming section and setting.
    """
    content = read_yaml(path)
    if MARK in content:
        raise ConfigError(f"{path} is the config of one run, not of all stages; go on with that run by its own command.")
    _check_keys(path, content)
    place = str(output) if output is not None else content.get("output")
    if not isinstance(place, str) or not place:
        raise ConfigError(f"{path}: output={place!r} is no folder; write output: runs/my-run.")
    folder = Path(place).expanduser()
    configs = {stage: _stage_config(path, stage, content, folder, flags.get(stage, ())) for stage in CLASSES}
    export = _section(path, "export", content, ExportSettings)
    try:
        found = build(ExportSettings, as_values(ExportSettings()) | export)
        if not isinstance(found.roles, list) or any(role not in ("actor", "reward", "critic") for role in found.roles):
            raise ConfigError(f"roles={found.roles!r} is not a list of actor, reward and critic; write for example [actor].")
        if not isinstance(found.adapter_only, bool):
            raise ConfigError(f"adapter_only={found.adapter_only!r} is not true or false; write true or false.")
    except ConfigError as error:
        raise ConfigError(f"{path}, export: {error}") from None
    sft, ppo = configs["sft"], configs["ppo"]
    assert isinstance(sft, SFTConfig)
    assert isinstance(ppo, PPOConfig)
    return Plan(path, folder, sft, ppo, found)


def _check_keys(path: Path, content: Mapping[str, Any]) -> None:
    for key in content:
        if key in KEYS:
            continue
        owners = [stage for stage, kind in CLASSES.items() if str(key).split(".")[0] in {item.name for item in fields(kind)}]
        guess = nearest(str(key), KEYS)
        if owners:
            remedy = f"it belongs into the section {' or '.join(owners)}; indent it there."
        else:
            remedy = f"did you mean {guess}?" if guess else f"choose among {', '.join(KEYS)}."
        raise ConfigError(f"{path}: {key} is no section of this file; {remedy}")


def _section(path: Path, name: str, content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the settings of a section by full name."""
    found = content.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{path}: {name}={found!r} is no section; indent its settings below it.")
    try:
        return flatten(found or {}, kind)
    except ConfigError as error:
        raise ConfigError(f"{path}, {name}: {error}") from None


def _stage_config(path: Path, stage: str, content: Mapping[str, Any], output: Path, flags: Sequence[str]) -> Any:
    kind = CLASSES[stage]
    try:
        shared = flatten({name: deepcopy(content[name]) for name in SHARED if name in content}, kind)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    own = _section(path, stage, content, kind)
    for where, given in ((str(path), shared), (f"{path}, {stage}", own)):
        for name, why in OURS.items():
            if name in given:
                raise ConfigError(f"{where}: {name}={given[name]!r} is {why}; leave it out.")
    flat = shared | own | {"run.output": str(output / stage)}
    if stage == "ppo":
        start = str(output / "sft")
        for name in ("model.name_or_path", "model.adapter"):
            if own.get(name) is not None:
                raise ConfigError(f"{path}, ppo: {name}={own[name]!r}, and this stage begins from {start}; leave it out.")
        flat.pop("model.adapter", None)
        flat["model.name_or_path"] = start
    try:
        found = parse(kind, stage, flags, nest(flat)).config
    except ConfigError as error:
        raise ConfigError(f"{path}, {stage}: {error}") from None
    if found is None:
        raise ConfigError(f"{path}, {stage}: {', '.join(flags)} are no settings; write --{stage}.NAME VALUE.")
    return found


def print_plan() -> str:
    """Return a file of all settings with their help, which reads back once what is required is filled in."""

    def rest(kind: type, leave: Sequence[str]) -> type:
        kept = [item for item in fields(kind) if item.name not in leave]
        return make_dataclass("Rest", [(item.name, _hint(kind, item.name), item) for item in kept])

    def text(kind: type, why: Evidence) -> str:
        return textwrap.indent(render_yaml(kind, _defaults(kind), why=why), "  ")

    model = {name.removeprefix("model."): found for name, found in evidence(PPOConfig).items() if name.startswith("model.")}

    head = [
        "# Joint SFT and reward model, PPO, evaluation, export: hydra-ppo rlhf FILE. What a stage needs besides is in its",
        "# section; model, data and run may stand in a section too, and win there.",
        "",
        "# Folder of all stages: sft, ppo, evaluation, export, summary.json (a string; required)",
        "# output: ???",
        "",
    ]
    parts = ["\n".join(head)]
    for name, kind in (("model", ModelSettings), ("data", DataSettings), ("run", rest(RunSettings, ("output", "overwrite")))):
        parts.append(f"{name}:\n{text(kind, model if name == 'model' else {})}")
    for name, config in CLASSES.items():
        parts.append(f"# {(config.__doc__ or '').splitlines()[0]}\n{name}:\n{text(rest(config, SHARED), evidence(config))}")
    parts.append(f"# {(ExportSettings.__doc__ or '').splitlines()[0]}\nexport:\n{text(ExportSettings, {})}")
    return "\n".join(parts)


def _hint(kind: type, name: str) -> Any:
    from typing import get_type_hints

    return get_type_hints(kind)[name]


def _defaults(kind: type) -> dict[str, Any]:
    from hydra_ppo.config.reading import settings_of

    return nest({name: found.default for name, found in settings_of(kind).items() if not found.required})


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; {} where there is none, or it is no mapping."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
