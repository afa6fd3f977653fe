"""One row as a run will read it: prompt, answer, where it ends, what the reward reads. Needs the tokenizer, and no weight."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from hydra_ppo.config.settings import ModelSettings, PPOConfig, SFTConfig
from hydra_ppo.data.ends import Ends, find_ends
from hydra_ppo.data.rows import load_preferences, load_prompts
from hydra_ppo.data.sources import open_source
from hydra_ppo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED = 50
"""Rows that are looked at until one is usable."""

SHOWN = 300
"""Characters of a text that are shown: the end of a prompt, the beginning and the end of an answer."""


def example_table(config: SFTConfig | PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Table:
    """Lay out the first usable row of the training data, and where answers end."""
    table = Table(title="One row, as it is read", title_justify="left", show_lines=True)
    table.add_column("what")
    table.add_column("found", overflow="fold")
    for name, text in example_row(config, tokenizer):
        table.add_row(name, Text(text))
    return table


def example_row(config: SFTConfig | PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Return what the first usable row says, in pairs of what it is and its text."""
    ends = find_ends(tokenizer, generation_ids=configured_ends(config.model), end_of_turn=config.data.end_of_turn)
    found = [("end", describe_ends(ends, tokenizer))] + [("note", note) for note in ends.notes]
    load = load_prompts if isinstance(config, PPOConfig) else load_preferences
    for _, raw in islice(open_source(config.data.train, config.data.split).rows, TRIED):
        try:
            row: Any = load([raw], tokenizer, config.data).rows[0]
        except DataError:
            continue
        if isinstance(config, PPOConfig):
            found.append((f"prompt, {len(row.ids)} tokens", _tail(row.text)))
        else:
            found.append((f"prompt, {len(row.prompt_ids)} tokens", _tail(row.prompt_text)))
            for name, ids in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
                found.append((f"{name}, {len(ids)} tokens", _middle(str(tokenizer.decode(ids)))))
        break
    else:
        found.append(("row", f"none of the first {TRIED} rows is usable; the run says why"))
    return [*found, ("the reward reads", _readers(config, ends))]


def describe_ends(ends: Ends, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return where answers end, in a line."""
    others = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ends.ids if i != ends.turn]
    return ends.describe() + (f"; a rollout stops at {', '.join(others)} too" if others else "")


def configured_ends(settings: ModelSettings) -> list[int]:
    """Return the end ids of the generation config that lies with the base; none where there is no such file here."""
    from transformers import GenerationConfig

    from hydra_ppo.model.manifest import MANIFEST, base_folder, read_manifest

    folder = Path(settings.name_or_path)
    recorded = read_manifest(folder).get("end_ids") if (folder / MANIFEST).is_file() else None
    if recorded:
        return [int(i) for i in recorded]
    name = base_folder(folder) if (folder / MANIFEST).is_file() else settings.name_or_path
    try:
        found = GenerationConfig.from_pretrained(name).eos_token_id
    except (OSError, ValueError):
        return []
    return [i for i in (found if isinstance(found, list) else [found]) if i is not None]


def _readers(config: SFTConfig | PPOConfig, ends: Ends) -> str:
    head = f"the reward head: the state at {ends.text} of prompt + answer, or at the last token of an answer that is cut"
    if not isinstance(config, PPOConfig):
        return head
    special = "special tokens left out" if config.data.special_tokens == "hide" else "special tokens shown"
    names = {
        "function": f"the text of prompt and answer, {special}",
        "http": "prompt and answer as the tokens spell them, special tokens shown",
        "classifier": f"the conversation in its own template, or the text of prompt + answer, {special}",
    }
    lines = []
    for source in config.reward.sources:
        name = source.kind if source.target is None else f"{source.kind} {source.target}"
        own = source.kind == "head" and source.target is None
        what = head.partition(": ")[2] if source.kind == "head" else names.get(source.kind, names["function"])
        lines.append(head if own else f"{name}: {what}")
    return "\n".join(lines)


def _tail(text: str) -> str:
    return text if len(text) <= SHOWN else "…" + text[-SHOWN:]


def _middle(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
