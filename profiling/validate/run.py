"""Everything that needs a GPU, in one command: ``python -m hydra_ppo.profiling.validate --device cuda``.

Role equivalence in bf16 and nf4, measured against simulated peaks, tokens per second by phase, sampling beside transformers'
own, updates beside TRL's, and the tests that are marked gpu. One JSON file and its table, written anew after every part: an
interrupted run leaves what it found. On a CPU the same runs on tiny models.

Exit codes: 0 all that ran is as it should be, 1 a part failed or missed its tolerance, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hydra_ppo.cli.main import BAD_INPUT, DONE, FAILED, set_up_output
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.profiling.measuring.record import versions
from hydra_ppo.profiling.validate.parts import Budget, Part, described, require, run_parts, say, verdict

FORMAT = 1
BUDGET = 420.0
"""Seconds; with imports and a last part that takes longer than thought, below eight minutes."""

TINY = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 2, "pad_token_id": 0},
}
"""Fields of the Llamas that stand in for the real ones on a CPU."""

SMALL = {
    **{"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048},
}
"""Fields of the Llama whose roles are compared on a GPU."""


def make_parts(device: Any) -> list[Part]:
    """Return what is validated on a torch device, the most important first."""
    from transformers import LlamaConfig

    from hydra_ppo.profiling.subjects.shapes import model_config
    from hydra_ppo.profiling.validate.generate import check_generate
    from hydra_ppo.profiling.validate.marked import check_tests
    from hydra_ppo.profiling.validate.memory import check_memory
    from hydra_ppo.profiling.validate.roles import check_roles
    from hydra_ppo.profiling.validate.speed import check_speed
    from hydra_ppo.profiling.validate.trl import check_budget, check_trl
    from hydra_ppo.profiling.workload import Workload

    real = device.type == "cuda"
    small, large = ("llama-3.2-1b", "llama-3.1-8b") if real else ("tiny-2", "tiny-3")
    sizes: dict[str, Any] = {} if real else {"prompt": 24, "response": 8, "rollout_batch": 4}
    # Beside others: short enough for three updates of each, and rows as PPO takes them on such a card.
    beside = {"prompt": 128, "response": 128, "rollout_batch": 32, "microbatch": 8, "score_batch": 8} if real else sizes

    def roles(quantization: Any, seconds: float) -> dict[str, Any]:
        require(quantization)
        config = LlamaConfig(**(SMALL if real else TINY | {"num_hidden_layers": 2}))
        return check_roles(config, quantization, device, tokens=128 if real else 16)

    def sized(
        check: Callable[..., dict[str, Any]], model: str, quantization: Any, seconds: float, sizes: dict[str, Any] = sizes
    ) -> dict[str, Any]:
        config = model_config(model) if real else LlamaConfig(**TINY, num_hidden_layers=int(model[-1]))
        return check(Workload(model, quantization=quantization, **sizes), config, device, seconds)

    parts = [
        Part("roles bf16", partial(roles, None), 1.0, 10),
        Part("roles nf4", partial(roles, "nf4"), 1.0, 10),
        Part(f"memory {small} bf16", partial(sized, check_memory, small, None), 2.0, 20),
        Part(f"memory {small} nf4", partial(sized, check_memory, small, "nf4"), 2.0, 20),
        Part(f"memory {large} nf4", partial(sized, check_memory, large, "nf4"), 4.0, 40),
        Part(f"memory {large} bf16", partial(sized, check_memory, large, None), 3.5, 40),
        Part(f"speed {small} bf16", partial(sized, check_speed, small, None), 1.5, 15),
        Part(f"speed {large} nf4", partial(sized, check_speed, large, "nf4"), 3.0, 30),
        Part(f"generate {small} bf16", partial(sized, check_generate, small, None, sizes=beside), 1.0, 15),
        Part(f"trl {small} bf16", partial(sized, check_trl, small, None, sizes=beside), 1.5, 20),
        Part(f"trl {small} bf16 within a budget", partial(sized, check_budget, small, None, sizes=beside), 2.0, 40),
        Part("tests marked gpu", check_tests, 2.5, 20),
    ]
    # A larger tiny model would show nothing more of memory.
    return parts if real else [part for part in parts if not part.name.startswith(f"memory {large}")]


def describe_machine(device: Any) -> dict[str, Any]:
    """Return name, memory (bytes), driver and CUDA of a torch device, and the kernel that attention=auto takes for bf16."""
    import torch

    from hydra_ppo.model.loading import resolve_attention

    attention = resolve_attention("auto", device, torch.bfloat16)
    machine: dict[str, Any] = {"type": device.type, "name": "cpu", "attention": attention}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "name": properties.name,
            "total_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return machine


def results_table(parts: dict[str, dict[str, Any]]) -> Table:
    """Return one row per part."""
    table = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("part", "left"), ("result", "left"), ("seconds", "right"), ("found", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "found")
    for name, result in parts.items():
        table.add_row(name, verdict(result), f"{result['seconds']:.0f}", described(result))
    return table


def as_markdown(record: dict[str, Any]) -> str:
    """Return the table of a record as a page."""
    versions_, device = record["versions"], record["device"]
    held = f", {device['total_memory_bytes'] / 2**30:.0f} GiB" if "total_memory_bytes" in device else ""
    lines = [
        f"# {device['name']}{held}, {record['date'][:10]}",
        "",
        f"`make gpu`, {record['seconds']:.0f} s; torch {versions_.get('torch')}, transformers {versions_.get('transformers')}, "
        f"bitsandbytes {versions_.get('bitsandbytes')}; attention {device['attention']}.",
        "",
        "| part | result | seconds | found |",
        "|---|---|---|---|",
    ]
    for name, result in record["parts"].items():
        found = described(result).replace("|", "/")
        lines.append(f"| {name} | {verdict(result)} | {result['seconds']:.0f} | {found} |")
    return "\n".join(lines) + "\n"


def validate(device: str, output: Path | None, seconds: float) -> int:
    """Run all parts, write the JSON file and print the table; return the exit code.

    Args:
        device: auto, cpu, cuda or cuda:N.
        output: file to write; None is docs/measurements/<device>-<date>.json.
        seconds: for all parts together.

    Raises:
        ConfigError: when the device cannot be used, or the file is there already.
    """
    budget = Budget(seconds)
    now = datetime.now().astimezone()
    if output is not None:
        _refuse_existing(output)
    say(budget, "importing")
    from hydra_ppo.model.loading import resolve_device
    from hydra_ppo.profiling.validate.memory import GOAL
    from hydra_ppo.profiling.validate.speed import free

    place = resolve_device(device)
    machine = describe_machine(place)
    slug = re.sub("[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    path = output or Path("docs/measurements") / f"{slug}-{now:%Y-%m-%d}.json"
    _refuse_existing(path)
    record = {
        "format": FORMAT,
        "date": now.isoformat(timespec="seconds"),
        "device": machine,
        "versions": versions("flash-attn"),
        "budget_seconds": seconds,
        "memory_goal": GOAL,
    }

    def keep(parts: dict[str, dict[str, Any]]) -> None:
        whole = record | {"seconds": budget.used, "passed": _passed(parts), "parts": parts}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(as_markdown(whole), encoding="utf-8")

    parts = run_parts(make_parts(place), budget, keep, clean=lambda: free(place))
    console = Console()
    console.print(results_table(parts))
    console.print(f"{machine['name']}, {budget.used:.0f} s. Written to {path}.", highlight=False, markup=False, soft_wrap=True)
    return DONE if _passed(parts) else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    set_up_output()
    parser = argparse.ArgumentParser("python -m hydra_ppo.profiling.validate.run", description=__doc__.split("\n\n")[1])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help="JSON file; by default docs/measurements/<device>-<date>.json."
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"Time to take; {BUDGET:.0f}.")
    options = parser.parse_args(argv)
    try:
        return validate(options.device, options.output, options.budget)
    except HydraError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _passed(parts: dict[str, dict[str, Any]]) -> bool:
    return all(verdict(result) in ("passed", "skipped") for result in parts.values())


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"output={str(path)!r} exists, and a measurement is not written over; name another file.")


def _driver() -> str | None:
    """Ask nvidia-smi for the driver's version; None where it does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
