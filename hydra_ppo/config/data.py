"""Where rows come from, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import expand_home, required, setting
from hydra_ppo.config.fields import positive as _positive

ROW_COLUMNS = ("prompt", "chosen", "rejected", "messages", "responses", "ratings", "margin", "tools", "chat_template_kwargs")
"""Columns of a row that are read; all others are handed to reward functions."""

TEMPLATE_OPTIONS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""What `apply_chat_template` decides itself, and no setting or row may."""


@dataclass(frozen=True)
class DataSettings:
    """Where examples come from and how long they may be."""

    train: str = required("Training data: a .jsonl, .json, .csv or .parquet file, or a hub dataset (name or name:config).")
    eval: str | None = setting(None, "Held-out data of the same kind; null splits eval_fraction off the training data.")
    split: str = setting("train", "Split to read when the training data is a hub dataset.")
    eval_split: str = setting("test", "Split to read when the held-out data is a hub dataset.")
    eval_fraction: float = setting(0.05, "Share of the training data held out when no eval data is given.")
    columns: dict[str, str] = setting(
        dict, "Your names of columns, by ours: {prompt: question, chosen: response_j}; completions.text goes into lists."
    )
    format: Literal["pairs", "ranked", "rated"] = setting(
        "pairs", "sft: chosen and rejected in each row, a list of responses with the best first, or responses and ratings."
    )
    pairs_per_prompt: int | None = setting(
        None, "Most pairs of a ranked or rated row, those furthest apart first; null takes every two responses."
    )
    max_prompt_tokens: int = setting(512, "Longest prompt, in tokens.")
    max_response_tokens: int = setting(512, "Longest chosen or rejected response of a preference pair, in tokens.")
    long_prompts: Literal["error", "drop", "truncate"] = setting(
        "truncate", "A prompt over the limit: stop, drop the row, or keep its last max_prompt_tokens tokens."
    )
    skip_bad_rows: bool = setting(False, "Drop and count malformed rows instead of stopping at them.")
    degenerate_pairs: Literal["drop", "error"] = setting(
        "drop", "Pairs whose answers are equal, or one of which is empty: drop and count them, or stop."
    )
    end_of_turn: str | None = setting(
        None, "The token that ends an answer, such as <|im_end|>; null takes what the chat template puts there, else eos."
    )
    special_tokens: Literal["hide", "show"] = setting(
        "hide", "Whether reward functions and classifiers see special tokens inside answers, such as <think>."
    )
    chat_template_kwargs: dict[str, Any] = setting(dict, "Handed to the chat template, such as {enable_thinking: false}.")

    def __post_init__(self) -> None:
        expand_home(self, "train", "eval")
        _check(self, "end_of_turn", self.end_of_turn != "", "is empty", "name a token, or leave it null")
        _check(self, "train", bool(self.train), "is empty", "name a file or a dataset")
        _positive(self, "max_prompt_tokens", "max_response_tokens", "pairs_per_prompt")
        unknown = next((name for name in self.columns if name not in ROW_COLUMNS), None)
        rule = f"has the key {unknown!r}, which is no column that is read"
        _check(self, "columns", unknown is None, rule, f"use {', '.join(ROW_COLUMNS)}")
        names = list(self.columns.values())
        _check(self, "columns", len(set(names)) == len(names), "takes one column twice", "give each name one column")
        reserved = next((name for name in self.chat_template_kwargs if name in TEMPLATE_OPTIONS), None)
        remedy = "hand on only what the template itself reads"
        _check(self, "chat_template_kwargs", reserved is None, f"sets {reserved!r}, which is not the template's", remedy)
        _check(self, "eval_fraction", 0 <= self.eval_fraction < 1, "must lie in [0, 1)", "choose for example 0.05")
