"""An sft run whose answers end in another token than the tokenizer's eos, with pairs, for the commands around reward heads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from hydra_ppo.cli.main import main
from tests.hydra_ppo.cli.test_score_generate import chat_tokenizer, pair, write_rows
from tests.training import llama


def make_project(folder: Path) -> Path:
    """Write base, sft run, pairs.jsonl (96 pairs), held_out.jsonl (24), and open.jsonl (16 of two responses, not compared)."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama(vocab_size=40)).save_pretrained(folder / "base")
    chat_tokenizer().save_pretrained(folder / "base")
    rng = random.Random(0)
    write_rows(folder / "pairs.jsonl", [pair(rng) for _ in range(96)])
    write_rows(folder / "held_out.jsonl", [pair(rng) for _ in range(24)])
    drawn = [pair(rng) for _ in range(16)]
    write_rows(folder / "open.jsonl", [{"prompt": r["prompt"], "responses": [r["rejected"], r["chosen"]]} for r in drawn])
    settings = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "held_out.jsonl"), "max_response_tokens": 8},
        "run": {"output": str(folder / "sft"), "progress": False},
        "epochs": 2,
        "batch_size": 8,
        "reward_coef": 1.0,
        "optimizer": {"learning_rate": 3e-3},
    }
    assert main(["sft", write(folder / "sft.yaml", settings)]) == 0
    return folder


def ppo_settings(folder: Path, output: Path, sources: list[dict], **changes) -> dict:
    """Settings of a short PPO run on the sft run."""
    return {
        "model": {"name_or_path": str(folder / "sft")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.1},
        "run": {"output": str(output), "progress": False, "memory": "never"},
        "rollout": {"batch_size": 8, "max_new_tokens": 6, "samples_per_prompt": 2, "score_batch_size": 3},
        "reward": {"sources": sources},
        "optimizer": {"learning_rate": 3e-3},
        "steps": 2,
        "minibatch_size": 4,
        "sample_every": 1,
    } | changes


def write(path: Path, settings: dict) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def make_features(folder: Path, count: int, dim: int = 12, seed: int = 0, noise: float = 1.0, per_prompt: int = 1) -> Path:
    """Write a folder of features as hydra-ppo features would, of answers whose worth is linear in them.

    The better answer comes first with probability sigmoid(difference / noise), as Bradley and Terry have it.
    """
    rng = np.random.default_rng(seed)
    direction = np.linspace(-1.5, 1.5, dim)
    states = rng.normal(size=(count, 2, dim)) + 3.0
    gap = (states[:, 0] - states[:, 1]) @ direction
    swap = rng.random(count) > 1 / (1 + np.exp(-gap / noise))
    states[swap] = states[swap][:, ::-1]
    folder.mkdir(parents=True)
    np.save(folder / "states.npy", states.astype(np.float16))
    pairs = np.stack([np.arange(count) // per_prompt, np.full(count, 5), np.full(count, 4), np.ones(count)], axis=1)
    np.save(folder / "pairs.npy", pairs.astype(np.int32))
    write_rows(folder / "rows.jsonl", [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(count)])
    origin = {"base": None, "adapter": None, "end": 2, "hidden_size": dim}
    origin |= {"quantization": None, "embeddings": None, "dtype": "float32"}
    (folder / "features.json").write_text(json.dumps({"format": 1, "pairs": count, "means": False, "origin": origin}))
    return folder
