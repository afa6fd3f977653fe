"""Small models, tokenizers, rows and settings for tests that train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hydra_ppo.config.settings import (
    DataSettings,
    KLSettings,
    ModelSettings,
    OptimizerSettings,
    PPOConfig,
    RolloutSettings,
    RunSettings,
    SFTConfig,
)
from hydra_ppo.data.rows import PreferenceRow, PromptRow
from hydra_ppo.model.hydra import HydraModel

WORDS = [f"w{i}" for i in range(28)]
MODEL = ModelSettings(name_or_path="unused")
DATA = DataSettings(train="unused")
RUN = RunSettings(output="unused", memory="never")


def llama(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def prompts(count: int = 16) -> list[PromptRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 7, (), generator=generator))
        ids = torch.randint(4, 32, (length,), generator=generator).tolist()
        rows.append(PromptRow(" ".join(WORDS[i - 4] for i in ids), tuple(ids)))
    return rows


def pairs(count: int = 64) -> list[PreferenceRow]:
    """Chosen responses count upwards from token 4, rejected ones are anything else."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt in prompts(count):
        length = int(torch.randint(2, 6, (), generator=generator))
        chosen = (*range(4, 4 + length), 2)
        rejected = (*torch.randint(12, 32, (length,), generator=generator).tolist(), 2)
        rows.append(PreferenceRow(prompt.text, "", "", prompt.ids, chosen, rejected))
    return rows


def hydra(train: str = "ppo", seed: int = 0, **changes) -> HydraModel:
    torch.manual_seed(seed)
    options = {k: changes.pop(k) for k in ("quantization", "trunk_layers", "dtype", "lora") if k in changes}
    model = HydraModel.from_config(llama(**changes), train=train, **options)
    with torch.no_grad():
        # Random heads are small; a frozen one this size would leave the adapters no say in what is sampled.
        model.architecture.output_embeddings.weight.mul_(10)
    return model


def sft_config(**changes) -> SFTConfig:
    base = SFTConfig(
        model=MODEL,
        data=DATA,
        run=RUN,
        optimizer=OptimizerSettings(learning_rate=3e-3),
        batch_size=8,
        microbatch_size=4,
        epochs=2,
        eval_every=8,
    )
    return replace(base, **changes)


def ppo_config(**changes) -> PPOConfig:
    base = PPOConfig(
        model=MODEL,
        data=DATA,
        run=RUN,
        rollout=RolloutSettings(batch_size=8, max_new_tokens=6, score_batch_size=3),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        kl=KLSettings(coef=0.02),
        steps=2,
        ppo_epochs=2,
        minibatch_size=4,
        microbatch_size=2,
    )
    return replace(base, **changes)


def write_model(folder: Path, **changes) -> Path:
    """Write a base with tokenizer, as it would come from a hub."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama(**changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def count_low_tokens(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward function: the share of words w0 to w7 in a response."""
    low = set(WORDS[:8])
    return [sum(word in low for word in text.split()) / max(1, len(text.split())) for text in responses]
