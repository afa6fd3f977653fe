"""A folder with a base, data and settings, as a user would have it, and how two runs of it are compared."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.training import WORDS, write_model


def make_project(folder: Path, **changes: Any) -> Path:
    """Write a base with tokenizer, pairs, and an SFT model's stand-in: the base itself."""
    write_model(folder / "base", **changes)
    rng = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(24):
            prompt = " ".join(rng.choices(WORDS, k=rng.randint(2, 5)))
            chosen, rejected = (" ".join(rng.choices(words, k=rng.randint(3, 5))) for words in (WORDS[:8], WORDS[8:]))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return folder


def ppo_settings(folder: Path, output: str = "run", **changes: Any) -> dict[str, Any]:
    """Settings that use every source of randomness and every running statistic."""
    settings = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.2},
        "run": {"output": str(folder / output), "progress": False, "save_every": 2, "keep_last": 2, "memory": "never"},
        "rollout": {"batch_size": 8, "max_new_tokens": 5, "score_batch_size": 3},
        "reward": {
            "sources": [{"kind": "function", "target": "tests.faults.light:noisy"}],
            "score_normalization": True,
        },
        "kl": {"adaptive": True, "horizon": 50},
        "optimizer": {"learning_rate": 3e-3},
        "steps": 6,
        "ppo_epochs": 2,
        "minibatch_size": 4,
        "microbatch_size": 2,
        "sample_every": 1,
        "eval_every": 3,
    }
    return merge(settings, changes)


def sft_settings(folder: Path, output: str = "run", **changes: Any) -> dict[str, Any]:
    """Settings of a joint SFT run over two epochs."""
    settings = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.2},
        "run": {"output": str(folder / output), "progress": False, "save_every": 2, "memory": "never"},
        "optimizer": {"learning_rate": 3e-3},
        "epochs": 3,
        "batch_size": 8,
        "microbatch_size": 2,
        "eval_every": 3,
    }
    return merge(settings, changes)


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with some replaced."""
    merged = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def write(path: Path, settings: dict[str, Any]) -> str:
    """Write settings as YAML; return the path."""
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def quick_first(names: Iterable[str], quick: int) -> list[Any]:
    """Return test parameters of which all but the first few are left to `make test-faults`."""
    return [name if i < quick else pytest.param(name, marks=pytest.mark.long) for i, name in enumerate(names)]


def weights(run: Path) -> dict[str, bytes]:
    """Return every tensor that a run left, adapters, heads and a tuned base, as bytes."""
    found = {}
    for path in sorted([*run.glob("*.safetensors"), *run.glob("[!e]*/*.safetensors")]):  # none that was set aside: earlier-1
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(run)}:{name}"] = tensor.numpy().tobytes()
    return found


def records(run: Path, name: str = "metrics.jsonl", without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return what a run logged, without times, and without what begins with a word of `without`."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", *without))} for line in lines]


def assert_same(run: Path, whole: Path, without: tuple[str, ...] = ()) -> None:
    """Check that two runs ended with the same bits, metrics and samples.

    Args:
        without: beginnings of metrics that may differ: a run that ended earlier was evaluated there.
    """
    one, other = weights(run), weights(whole)
    assert one.keys() == other.keys()
    assert one, "no weights were compared"
    different = [name for name in one if one[name] != other[name]]
    assert not different, different
    assert records(run, without=without) == records(whole, without=without)
    if (whole / "samples.jsonl").exists():
        # A run that ended before evaluated there, which the whole one did not; what it answered then goes with that.
        all_rows = not any("eval/".startswith(name) for name in without)
        found, wanted = (
            [row for row in records(one, "samples.jsonl") if all_rows or "held_out" not in row] for one in (run, whole)
        )
        assert found == wanted
