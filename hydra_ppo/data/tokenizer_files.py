"""Writes a tokenizer so that transformers 4 and 5 both load it, whichever of them it was loaded with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.runtime.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
BACKEND, FAST = "TokenizersBackend", "PreTrainedTokenizerFast"
"""What transformers 5 calls a tokenizer of tokenizers' own, and the name that both versions know."""
OF_THIS_CALL = ("is_local", "local_files_only")
"""Arguments of the call that loaded it, which transformers 5 writes down."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into a folder; see the module."""
    tokenizer.save_pretrained(folder)
    for_both_versions(folder)


def for_both_versions(folder: Path) -> None:
    """Rewrite `tokenizer_config.json` in a folder where only transformers 5 could read it, or would read more than others."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = {name: value for name, value in before.items() if name not in OF_THIS_CALL}
    if config.get("tokenizer_class") == BACKEND:
        config["tokenizer_class"] = FAST
    # Of one name, 4 takes a mapping and 5 writes a list; the list has an older name that both read.
    if isinstance(more := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *more]
    template = folder / TEMPLATE
    several = (folder / "additional_chat_templates").is_dir()
    if template.is_file() and not several and "chat_template" not in config:  # 4.46 looks for it nowhere else
        config["chat_template"] = template.read_text(encoding="utf-8")
    if config != before:
        write_whole(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
