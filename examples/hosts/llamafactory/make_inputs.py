"""Writes tiny inputs for ppo.yaml: a base with random weights, prompts, and preference pairs. No download.

python make_inputs.py runs/llamafactory
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = ["say hello", "name a colour", "count to three", "what is water", "sing a song", "where is the sea", "who are you"]


def make(folder: Path, config: LlamaConfig | None = None) -> Path:
    """Write base/, data/ (as LLaMA-Factory reads it) and pairs.jsonl (as hydra-ppo sft reads it) into `folder`."""
    tokens = {token: number for number, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder / "base")
    config = config or LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")

    data = folder / "data"
    data.mkdir(exist_ok=True)
    rows = [{"instruction": f"{prompt} {number}", "input": "", "output": ""} for prompt in PROMPTS for number in range(8)]
    (data / "prompts.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"prompts": {"file_name": "prompts.json"}}))
    pairs = [{"prompt": row["instruction"], "chosen": " yes please", "rejected": " no"} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


if __name__ == "__main__":
    make(Path(sys.argv[1]))
