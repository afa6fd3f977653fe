"""What the checks of all hosts share. Runs in each host's own environment, so it imports no test library.

A check trains with the host's own trainer, patched or not, and writes a `Result`; `tests.hosts.run` judges it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.runtime.memory import LiveBytes

VOCABULARY = 1024  # large beside the hidden size, as in real models: full logits must cost something
PAD, BOS, EOS = 0, 1, 2


@dataclass
class Result:
    """What one run of one host showed.

    Attributes:
        host: name and version.
        mode: patched or unpatched.
        versions: of what matters.
        losses: value losses (total losses where the host reports no other), in order.
        differences: largest absolute difference between the roles' numbers as the host computes them on views and on four
            separate models of equal weights, before training: logprobs, ref_logprobs, values, scores.
        changed: roles whose adapter training changed.
        base_identical: whether every tensor of the base is bit-identical after training.
        undone: whether the host's attributes are the very ones they were, once the patch is taken back.
        peak_bytes: live tensor storages at most, models included.
        seconds: of training, with the count of tensors on.
        problems: what is wrong beyond that; any of them fails the check.
        notes: anything else worth a line.
    """

    host: str
    mode: str
    versions: dict[str, str]
    losses: list[float] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    base_identical: bool = True
    undone: bool = True
    peak_bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(host: str, packages: tuple[str, ...], patched: Callable[[Result, Path], None], unpatched: Callable[..., None]) -> None:
    """Run one mode of a check: `python check.py --mode patched --folder F --output result.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=["patched", "unpatched"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    found = {name: version(name) for name in (*packages, "torch", "transformers", "peft")}
    found["python"] = sys.version.split()[0]
    result = Result(f"{host} {found[packages[0]]}", options.mode, found)
    (patched if options.mode == "patched" else unpatched)(result, options.folder)
    options.output.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of 4 layers."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**settings | changes)


def hydra_model(config: LlamaConfig | None = None) -> HydraModel:
    """A model at stage ppo whose four roles all differ: random actor and critic adapters, random heads."""
    torch.manual_seed(0)
    model = HydraModel.from_config(config or tiny_config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in model.trainable_roles:
            for parameter in model.role_parameters(role).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for head in model.heads.values():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.1)
    return model


def save_tuned(folder: Path, base: Path) -> Path:
    """Write what joint SFT would leave on the base in folder `base`: an `sft` adapter and a reward head, random ones."""
    model = HydraModel.from_pretrained(base, train="sft", dtype="fp32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.role_parameters("reward").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.reward_head_trained = True
    model.save_pretrained(folder)
    return folder


def separate_models(model: HydraModel) -> dict[str, PreTrainedModel]:
    """Build four Hugging Face models that share nothing, of weights equal to the roles', adapters merged."""
    return {role: separate_model(model, role) for role in ("actor", "reference", "critic", "reward")}


@torch.no_grad()
def separate_model(model: HydraModel, role: str) -> PreTrainedModel:
    """Build the causal LM or sequence classifier that `role` stands for, on its own, in fp32."""
    state: dict[str, Tensor] = {}
    spec = model.roles[role]
    for name, module in model.causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            state |= {f"{name}.{key}": value.detach().clone() for key, value in module.get_base_layer().named_parameters()}
            if spec.adapter in module.lora_A:
                state[f"{name}.weight"] += module.get_delta_weight(spec.adapter)
        elif "lora_" not in name and not name.endswith("base_layer"):
            state |= {f"{name}.{key}": value.detach().clone() for key, value in module.named_parameters(recurse=False)}
    config = deepcopy(model.causal_lm.config)
    if spec.head == "lm":
        separate = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = 1
        separate = AutoModelForSequenceClassification.from_config(config)
        state = {name: value for name, value in state.items() if not name.startswith(("lm_head", "embed_out"))}
        state["score.weight"] = model.heads[spec.head].weight.detach().clone()
    keys = separate.load_state_dict(state, strict=False)
    strangers = [*keys.unexpected_keys, *(name for name in keys.missing_keys if "rotary" not in name)]
    assert not strangers, strangers
    return separate.float()


def prompts(count: int, length: int = 16, seed: int = 3) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def difference(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Return the largest absolute difference, where `mask` says that numbers count."""
    gap = (found.float() - expected.float()).abs()
    return (gap if mask is None else gap[mask.bool()]).max().item()


@contextmanager
def watch(result: Result, models: dict[str, nn.Module] | list[nn.Module]) -> Iterator[None]:
    """Measure the block: peak bytes of live tensors, `models` included from the start, and seconds."""
    listed = models.values() if isinstance(models, dict) else models
    started = time.perf_counter()
    with LiveBytes([tensor for model in listed for tensor in (*model.parameters(), *model.buffers())]) as live:
        yield
    result.seconds = time.perf_counter() - started
    result.peak_bytes = live.peak


@contextmanager
def watch_training(result: Result, model: HydraModel) -> Iterator[None]:
    """As `watch`, for a patched run; checks too that adapters changed and the base did not."""
    roles = {role: {n: p.detach().clone() for n, p in model.role_parameters(role).items()} for role in model.trainable_roles}
    trained = {id(p) for role in model.trainable_roles for p in model.role_parameters(role).values()}
    base = {n: p.detach().clone() for n, p in (*model.named_parameters(), *model.named_buffers()) if id(p) not in trained}
    with watch(result, [model]):
        yield
    for role, before in roles.items():
        after = model.role_parameters(role)
        if any(not torch.equal(after[name], tensor) for name, tensor in before.items()):
            result.changed.append(role)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    result.base_identical = all(torch.equal(now[name], tensor) for name, tensor in base.items())


@contextmanager
def watch_undo(result: Result, owners: list[Any]) -> Iterator[None]:
    """Note in `result` whether the attributes of `owners` (modules, classes) are the same objects after the block."""
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, attributes in zip(owners, before, strict=True):
        now = vars(owner)
        names = (attributes.keys() | now.keys()) - {"__warningregistry__"}  # which Python itself adds
        changed = [name for name in names if attributes.get(name) is not now.get(name)]
        result.undone = result.undone and not changed
        if changed:
            result.problems.append(f"{owner!r}: {', '.join(sorted(changed))} not put back")
