"""What a LoRA adapter may be: the options of PEFT that a shared base can take, new ones and those of saved adapters."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.runtime.files import read_regular

logger = logging.getLogger("hydra_ppo")

REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "lora_dropout": ((0.0,), "would add noise to the ratio of PPO", "set lora_dropout=0"),
    "modules_to_save": ((None, []), "would train a copy of base layers", "leave it out"),
    "bias": (("none",), "would train biases of the base that all roles share", "use bias='none'"),
    "init_lora_weights": (
        (True, "gaussian"),
        "changes the base that all roles share, or gives the actor a start other than the reference",
        "use True or 'gaussian'",
    ),
    "use_dora": ((False,), "rounds, so that the actor would not start as the reference to the last bit", "leave it out"),
    "layers_to_transform": ((None, []), "is what trunk_layers sets", "use trunk_layers"),
    "layer_replication": ((None, []), "would give each role a depth of its own", "leave it out"),
    "trainable_token_indices": ((None, []), "would train embeddings that all roles share", "leave it out"),
}
"""PEFT options that a shared base cannot take: values that are fine, the rule that others break, what to do."""

TAKEN = {
    "target_parameters",
    *(
        "r",
        "lora_alpha",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
    ),
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("layers_pattern", "loftq_config", "eva_config", "corda_config", "runtime_config"),
}
"""PEFT options that are computed here, or that compute nothing by themselves. Of all others the default is taken, and no other
value: PEFT gets new ones with every version, and our forward pass would leave them out without a word."""


TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("r", "lora_alpha"), (int, float)),
    "use_rslora": (bool,),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    "target_modules": (list, str, type(None)),
    "target_parameters": (list, type(None)),
}
"""What options of a saved adapter must be, which PEFT takes as they come."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin an adapter after which it is one like any other; PiSSA, OLoRA, CorDA and LoftQ change the base too."""


def check_options(config: LoraConfig, where: str, ours: frozenset[str] = frozenset()) -> None:
    """Refuse options of PEFT that a shared base cannot take, or that are not computed here.

    Args:
        where: begins the error.
        ours: options that are set by this project itself.

    Raises:
        ConfigError: naming the first.
    """
    for name, (allowed, why, remedy) in REFUSED.items():
        value = getattr(config, name, allowed[0])
        if name not in ours and value not in allowed:
            raise ConfigError(f"{where}{name}={value!r} {why}; {remedy}.")
    plain = LoraConfig()
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if name not in TAKEN | REFUSED.keys() | ours and value != getattr(plain, name, None):
            raise ConfigError(f"{where}{name}={value!r} is not computed here, and would be left out silently; leave it out.")


def new_config(**options: Any) -> LoraConfig:
    """Make a LoRA config.

    Raises:
        ConfigError: where this PEFT does not know an option.
    """
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            f"lora.{unknown[0]}={options[unknown[0]]!r} is no option of this version of PEFT; update it, or leave it out."
        )
    return LoraConfig(**options)


def saved_options(folder: Path) -> LoraConfig:
    """Read the options of a saved adapter, and refuse those that cannot be taken; its dropout becomes 0.

    PEFT's own reader takes whatever a config names: another class, a module to import.

    Raises:
        ConfigError: naming the first.
    """
    what = f"adapter {str(folder)!r}"
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{what} lacks adapter_model.safetensors; save it again, as safetensors.")
    try:
        content = json.loads(read_regular(folder / "adapter_config.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} has an adapter_config.json that cannot be read ({error}); save it again.") from None
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{what} is of kind {kind}; only LoRA adapters can be taken.")
    if content.get("lora_dropout"):
        logger.info("%s was trained with lora_dropout=%s, which is 0 here", folder, content["lora_dropout"])
        content["lora_dropout"] = 0.0
    if content.get("init_lora_weights") in STARTS:  # they only say where training began
        content["init_lora_weights"] = True
    known = {field.name for field in fields(LoraConfig)}
    for name, value in content.items():
        if name not in known and value not in (None, False, 0, "", [], {}):
            raise ConfigError(f"{what}: {name}={value!r} is no option of this version of PEFT; update it, or leave it out.")
    for name, kinds in TYPES.items():
        value = content.get(name, kinds[0]())
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{what}: {name}={value!r} is {type(value).__name__}, not {kinds[0].__name__}; save it again.")
    try:
        config = LoraConfig(**{name: value for name, value in content.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} has options that PEFT refuses ({error}); save it again.") from None
    check_options(config, f"{what}: ", ours=frozenset({"layers_to_transform"}))
    return config


def adapter_folder(name: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter that somebody names.

    Raises:
        ConfigError: where it is none.
    """
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model.adapter={str(name)!r} holds no adapter_config.json; name a folder that PEFT's save_pretrained wrote."
        )
    return folder


def unused_settings(asked: LoraConfig | LoraSettings | None, found: LoraConfig, name: str) -> str | None:
    """Say which settings of new adapters a saved one, which has its own, leaves unused; None where there are none.

    Args:
        asked: what was set; the defaults ask for nothing.
        found: of the saved adapter.
        name: of the saved adapter.
    """
    if asked is None or asked == LoraSettings():
        return None
    alpha = asked.lora_alpha if isinstance(asked, LoraConfig) else asked.alpha
    pairs: dict[str, tuple[Any, Any]] = {
        "r": (asked.r, found.r),
        "alpha": (alpha, found.lora_alpha),
        "use_rslora": (asked.use_rslora, found.use_rslora),
    }
    if isinstance(asked, LoraSettings) and not isinstance(asked.target_modules, str):
        ours = {str(target).rsplit(".", 1)[-1] for target in found.target_modules or ()}
        pairs["target_modules"] = (sorted(asked.target_modules), sorted(ours))
    other = [f"{option}={was!r} (it has {has!r})" for option, (was, has) in pairs.items() if was != has]
    return f"model.lora is for new adapters, and {name!r} is a saved one: not used are {', '.join(other)}" if other else None
