"""Files of the real model classes with real tokenizers, tiny: sft, ppo, export; transformers stops where it should."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydra_ppo.cli.main import main
from tests.real.conftest import with_template
from tests.real.templates import FAMILIES

pytestmark = pytest.mark.long

SHAPE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "max_position_embeddings": 256,
}
MODELS = {
    "llama2": ("LlamaConfig", "v1-prepend", "llama2", {}),
    "llama3": ("LlamaConfig", "llama3", "llama3", {}),
    "mistral": ("MistralConfig", "v3-first", "mistral", {}),
    "nemo": ("MistralConfig", "tekken", "tekken", {}),
    "zephyr": ("MistralConfig", "v1-prepend", "zephyr", {}),
    "qwen2.5": ("Qwen2Config", "qwen", "qwen2.5", {}),
    "qwen3": ("Qwen3Config", "qwen", "qwen2.5", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "v1-bare", "gemma3", {"head_dim": 8}),
    "phi3": ("Phi3Config", "v1-prepend", "phi3", {}),
    "smollm2": ("LlamaConfig", "smollm2", "smollm2", {}),
}
"""Model class, tokenizer, template, and what the shape needs besides."""

ANSWERS = ("Yes, certainly.", "No, never.")


@pytest.mark.parametrize("name", MODELS)
def test_from_files_to_files_that_transformers_stops_with(name, tmp_path):
    class_name, kind, family, more = MODELS[name]
    tokenizer = with_template(kind, family)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    shape = getattr(transformers, class_name)(vocab_size=len(tokenizer), **SHAPE, **ids, **more)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rng = random.Random(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(48):
            asked = [{"role": "user", "content": f"Is {rng.randint(0, 99)} a number?"}]
            turns = {
                key: [{"role": "assistant", "content": text}] for key, text in zip(("chosen", "rejected"), ANSWERS, strict=True)
            }
            file.write(json.dumps({"prompt": asked, **turns}) + "\n")

    data = ["--data.train", str(tmp_path / "pairs.jsonl"), "--run.progress", "false"]
    sft = ["--method", "full", "--model.name_or_path", str(tmp_path / "base"), "--run.output", str(tmp_path / "sft")]
    sft += ["--optimizer.learning_rate", "1e-2", "--epochs", "8", "--batch_size", "8", "--microbatch_size", "8"]
    assert main(["sft", *data, *sft]) == 0
    ppo = ["--model.name_or_path", str(tmp_path / "sft"), "--run.output", str(tmp_path / "ppo"), "--steps", "1"]
    ppo += ["--rollout.batch_size", "8", "--minibatch_size", "8", "--rollout.max_new_tokens", "24", "--eval_prompts", "4"]
    assert main(["ppo", *data, *ppo]) == 0
    assert main(["export", str(tmp_path / "ppo"), "--output", str(tmp_path / "out")]) == 0
    assert main(["export", str(tmp_path / "ppo"), "--role", "reward", "--output", str(tmp_path / "reward")]) == 0

    exported, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "Is 7 a number?"}]
    inputs = exported.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    end = exported.convert_tokens_to_ids(FAMILIES[family].end)
    assert answer[-1] == end
    assert exported.decode(answer[:-1]).strip() == ANSWERS[0]
