"""Writes what run.sh needs, without a download: a tiny base with tokenizer, preference pairs, prompts, a reward classifier.

    python examples/hosts/swift/make_inputs.py FOLDER

The classifier is for swift as it is; with hydra-ppo the reward model is a head on the base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, with the special tokens and chat format of Qwen."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[1:2],
        chat_template=CHAT,
        padding_side="left",
    )


def make(folder: Path, rows: int = 64, **config: int) -> None:
    """Write `base`, `reward`, `pairs.jsonl` and `prompts.jsonl` into `folder`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    for name, kind in (("base", Qwen3ForCausalLM), ("reward", Qwen3ForSequenceClassification)):
        kind(Qwen3Config(**settings | config, num_labels=1)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with open(folder / "pairs.jsonl", "w") as pairs, open(folder / "prompts.jsonl", "w") as prompts:
        for i in range(rows):
            prompt = [{"role": "user", "content": f"What is {i} + {i * 3 % 7}?"}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (str(i + i * 3 % 7), "I do not know."))
            pairs.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
            prompts.write(json.dumps({"messages": prompt}) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
