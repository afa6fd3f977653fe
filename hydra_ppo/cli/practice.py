"""Loads what the actor practises beside PPO."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import PPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.data.rows import PreferenceRow

KINDS = ("ptx", "rehearsal")


def sources(config: PPOConfig) -> dict[str, str]:
    """Return the data of each kind that is practised, by its name."""
    found = {kind: getattr(config, kind).data for kind in KINDS}
    return {kind: data for kind, data in found.items() if data is not None}


def load_practice(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, now: datetime
) -> tuple[dict[str, list[PreferenceRow]], list[str]]:
    """Return the rows of each kind, and lines on what was left out; formats and lengths are those of `data`."""
    from hydra_ppo.data.rows import load_preferences

    rows: dict[str, list[Any]] = {}
    notes: list[str] = []
    for kind, data in sources(config).items():
        loaded = load_preferences(data, tokenizer, replace(config.data, train=data), now=now)
        rows[kind] = loaded.rows
        notes.append(f"{kind}.data: {len(loaded.rows)} of {len(loaded.rows) + loaded.skipped} rows are used")
        notes += [f"{kind}.data: {count} rows: {reason}" for reason, count in loaded.reasons.items()]
    if config.ptx.data is not None and config.ptx.coef > 1:
        notes.append(f"ptx.coef={config.ptx.coef:g} is above 1: what is practised outweighs PPO")
    return rows, notes
