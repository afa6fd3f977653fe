"""The page of a model on the hub: what it stands on, what came of it, how to load it; nothing of the machine it was made on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PureWindowsPath
from typing import Any

import yaml

from hydra_ppo import __version__
from hydra_ppo.config.reading import choices, settings_of
from hydra_ppo.data.sources import is_hub_name
from hydra_ppo.report.charts import number
from hydra_ppo.report.record import CONFIGS, RunRecord, changed_settings
from hydra_ppo.runs.outcomes import Outcome

CAUSAL = ("actor", "actor_ema")
WHAT = {
    "actor": "The policy",
    "actor_ema": "The running mean of the policy",
    "reward": "The reward model, a sequence classifier with one label,",
    "critic": "The critic, a sequence classifier with one label,",
}
OF_REWARD = ("eval/reward_accuracy", "eval/reward_ece")
"""Evaluations of the reward model; the others are of the policy."""
PATH = re.compile(r"(?<![\w.:/])(?:~?/|[A-Za-z]:[\\/])[^\s/\\'\"]+[/\\]")
"""What looks like a path of some machine."""


@dataclass(frozen=True)
class Pushed:
    """What is pushed.

    Attributes:
        repo: NAME/REPO.
        role: actor, actor_ema, reward or critic.
        base: the base's name on the hub; None where it has none there.
        base_name: what to call the base.
        merged: whether the base's weights are in it.
        kind: auto class that loads the base, or the whole.
        tokenizer: whether its own lies with it; else that of the base is meant.
        chat: whether that tokenizer has a chat template.
        ends: tokens that end an answer, the trained one first.
        end: the trained one as text.
        pad: token that fills up rows of a classifier.
    """

    repo: str
    role: str
    base: str | None
    base_name: str
    merged: bool
    kind: str
    tokenizer: bool
    chat: bool
    ends: Sequence[int]
    end: str
    pad: int | None

    @property
    def is_causal(self) -> bool:
        """Whether it says the next token."""
        return self.role in CAUSAL


def model_card(
    pushed: Pushed, record: RunRecord | None, data: Sequence[str], outcomes: Sequence[Outcome], notes: Sequence[str]
) -> str:
    """Return README.md of a model on the hub.

    Args:
        record: of the run; None where only a model is left of it.
        data: what the run read: files, folders, names on the hub; of paths the card has the last part.
        outcomes: of the run's evaluations, up to what is pushed.
        notes: what whoever loads it has to know; those that name a path are left out.
    """
    command = record.command if record is not None else None
    parts = [_front(pushed, command), f"# {_plain(pushed.repo.rpartition('/')[2])}", _first(pushed, command)]
    parts += ["## How to load it", f"```python\n{loading(pushed)}\n```"]
    if told := [note for note in notes if PATH.search(note) is None]:
        parts.append("\n".join(f"- {escape(' '.join(note.split()), quote=False)}" for note in told))
    if of_role := [one for one in outcomes if pushed.role == ("reward" if one.name in OF_REWARD else "actor")]:
        parts += ["## Held-out evaluation", _evaluations(of_role)]
    if record is not None:
        parts += ["## Training", _data(data), _settings(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def loading(pushed: Pushed) -> str:
    """Return lines of Python that load it and use it once."""
    whose = pushed.repo if pushed.tokenizer else str(pushed.base)
    kind = pushed.kind if pushed.is_causal else "AutoModelForSequenceClassification"
    lines = [f"from transformers import {', '.join(sorted(('AutoTokenizer', kind)))}"]
    if pushed.merged:
        lines.append(f"model = {kind}.from_pretrained({pushed.repo!r})")
    else:
        more = "" if pushed.is_causal else f", num_labels=1, pad_token_id={pushed.pad}"
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained({kind}.from_pretrained({pushed.base!r}{more}), {pushed.repo!r})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({whose!r})")
    messages = '[{"role": "user", "content": "Why is the sky blue?"}], add_generation_prompt=True'
    if pushed.is_causal:
        if pushed.chat:
            asked = f'apply_chat_template({messages}, return_dict=True, return_tensors="pt")'
            lines.append(f"ids = tokenizer.{asked}.input_ids")
        else:
            lines.append('ids = tokenizer("Why is the sky blue?", return_tensors="pt").input_ids')
        ends = f", eos_token_id={list(pushed.ends)}" if pushed.ends and not pushed.merged else ""
        return "\n".join([*lines, f"print(tokenizer.decode(model.generate(ids, max_new_tokens=64{ends})[0]))"])
    prompt = f"tokenizer.apply_chat_template({messages}, tokenize=False)" if pushed.chat else '"Why is the sky blue?"'
    lines.append(f'text = {prompt} + " Air scatters blue light." + {pushed.end!r}  # ends where the {pushed.role} was trained')
    begin = ", add_special_tokens=False" if pushed.chat else ""
    lines.append(f'print(model(tokenizer(text{begin}, return_tensors="pt").input_ids).logits[0, 0].item())')
    return "\n".join(lines)


def _front(pushed: Pushed, command: str | None) -> str:
    """Return what the hub reads of a card."""
    found: dict[str, Any] = {}
    if pushed.base is not None:
        found |= {"base_model": pushed.base, "base_model_relation": "finetune" if pushed.merged else "adapter"}
    found["library_name"] = "transformers" if pushed.merged else "peft"
    found["pipeline_tag"] = "text-generation" if pushed.is_causal else "text-classification"
    if not pushed.is_causal:
        found["tags"] = ["hydra-ppo", "rlhf", "reward-model" if pushed.role == "reward" else "critic"]
    else:
        found["tags"] = ["hydra-ppo", "rlhf", *([command] if command in CONFIGS else [])]
    return f"---\n{yaml.safe_dump(found, sort_keys=False).strip()}\n---"


def _first(pushed: Pushed, command: str | None) -> str:
    what = f"{WHAT[pushed.role]} of a run of `hydra-ppo{'' if command not in CONFIGS else f' {command}'}` {__version__}"
    base = (
        f"[{pushed.base}](https://huggingface.co/{pushed.base})" if pushed.base is not None else f"`{_plain(pushed.base_name)}`"
    )
    return f"{what}: {'the whole model, merged from an adapter and' if pushed.merged else 'a LoRA adapter on'} {base}."


def _evaluations(outcomes: Sequence[Outcome]) -> str:
    lines = ["| | before | after | gain |", "|---|---|---|---|"]
    for one in outcomes:
        before, after = map(number, one.values)
        error = "" if one.error is None else f" ± {number(one.error)}"
        gain = None if one.gain is None else number(one.gain) + error
        lines.append(f"| {one.label} (`{one.name}`) | {before if gain else '-'} | {after} | {gain or '-'} |")
    return "\n".join(lines) + "\n\nAfter ± is the standard error of the gain, taken prompt by prompt."


def _data(sources: Sequence[str]) -> str:
    names = [f"`{_plain(data_name(source))}`" for source in sources]
    return f"Data: {' and '.join(dict.fromkeys(names))}." if names else ""


def data_name(source: str) -> str:
    """Return the name of a data set of the hub, or the last part of a path."""
    return source if is_hub_name(source) else PureWindowsPath(source).name or "a folder"


def _settings(record: RunRecord) -> str:
    """Return the settings that are not at their defaults and that are numbers or words of this program.

    Nothing that somebody wrote out himself is among them: no path, address or name.
    """
    known = settings_of(CONFIGS[record.command]) if record.command in CONFIGS else {}
    rows = [
        f"| `{name}` | {now} |"
        for name, now, _ in changed_settings(record)
        if name in known
        and (name == "run.seed" or not name.startswith("run."))
        and _is_plain(record.settings[name], choices(known[name].hint))
    ]
    return (
        "\n".join(["Settings that are not at their defaults, paths and names left out:", "", "| | |", "|---|---|", *rows])
        if rows
        else ""
    )


def _is_plain(value: Any, words: Sequence[str]) -> bool:
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and value in words)


def _plain(text: str) -> str:
    """Return a name or line of others such that it is no markup."""
    return re.sub(r"[`<>\[\]|\n\r]", " ", text)
