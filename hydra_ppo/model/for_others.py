"""Writes models that other programs load: with plain weights, a valid generation config, and a config that transformers 4 and 5
read alike."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hydra_ppo.compat import dequantised
from hydra_ppo.runtime.files import write_whole

CONFIG = "config.json"
BY_LAYER_TYPE = {"gemma3_text": ("full_attention", "sliding_attention", "rope_local_base_freq")}
"""Families whose kinds of layers turn positions at different speeds, which transformers 4 reads too: the kind that has the
plain names, the other kind, and what its speed is called."""
OWN_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Families that have had other names for the same."""


def save_for_others(model: PreTrainedModel, folder: Path, **options: Any) -> list[str]:
    """Write a model with its config; return lines on what older readers would take otherwise.

    Args:
        options: for `save_pretrained`.
    """
    if getattr(model, "generation_config", None) is not None:
        _make_valid(model.generation_config)
    model.save_pretrained(folder, **options)
    return config_for_both_versions(folder)


def unquantised(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a quantised model with plain weights of a type, which can be saved."""
    plain: Any = dequantised(model, dtype)
    # transformers 5 would undo what its quantiser did when it read the weights, and cannot.
    kept = [step for step in getattr(plain, "_weight_conversions", None) or [] if _can_be_undone(step)]
    if hasattr(plain, "_weight_conversions"):
        plain._weight_conversions = kept
    return plain


def config_for_both_versions(folder: Path) -> list[str]:
    """Add to a `config.json` what transformers 4 looks for under other names; return a line where it has no name for it.

    Without these a rotary embedding falls back to its default there, and the model says other things without a word.
    """
    path = folder / CONFIG
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config, notes = _with_older_names(before)
    for name, inner in before.items():
        if name.endswith("_config") and isinstance(inner, dict) and "rope_parameters" in inner:
            config[name], more = _with_older_names(inner)
            notes += more
    if config != before:
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return notes


def _with_older_names(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    added: dict[str, Any] = {}
    notes: list[str] = []
    if "dtype" in config:
        added["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        kinds = BY_LAYER_TYPE.get(config.get("model_type", ""))
        if "rope_theta" in rope:
            added |= _older_rope(rope, config.get("model_type"))
        elif kinds is not None and set(rope) == set(kinds[:2]) and rope[kinds[1]].get("rope_type", "default") == "default":
            added |= _older_rope(rope[kinds[0]], None) | {kinds[2]: rope[kinds[1]]["rope_theta"]}
        else:
            notes.append(
                f"config.json of {config.get('model_type')} says how positions are turned by kinds of layers, which "
                "transformers before 5 reads otherwise: load it with 5"
            )
    return config | {name: value for name, value in added.items() if name not in config}, notes


def _older_rope(rope: dict[str, Any], family: str | None) -> dict[str, Any]:
    names = OWN_NAMES.get(str(family), {})
    found = {names.get(name, name): rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return found
    if family == "phi3":  # which takes these three and no others
        return found | {"rope_scaling": {"type": kind} | {name: rope[name] for name in ("short_factor", "long_factor")}}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return found | {"rope_scaling": scaling}


def _can_be_undone(step: Any) -> bool:
    try:
        step.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _make_valid(settings: Any) -> None:
    """Let a generation config be written that names a temperature and does not sample, as old models' do.

    Every version refuses it, and each in its own way: as an error, or up to 4.47 as warnings that are errors on saving.
    """
    options = {"strict": True} if "strict" in settings.validate.__code__.co_varnames else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            settings.validate(**options)
        except ValueError:
            settings.do_sample = True
    if said:
        settings.do_sample = True
