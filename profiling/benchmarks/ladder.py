"""The base-copy ladder: what each further role costs, on real tensors.

`python -m hydra_ppo.profiling.benchmarks.ladder` builds a Llama of 57 million parameters (fp32, 217 MiB) as actor alone,
as actor and critic, and as all four roles, each in a process of its own, and prints live tensor bytes and the resident
memory of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hydra_ppo.runtime.tables import print_table

RUNGS = ("actor", "actor, critic", "actor, critic, reference, reward")
MIB = 2**20


@dataclass(frozen=True)
class Rung:
    """One rung: its roles; bytes of base, of adapters and heads; resident bytes of the process, and of it before the model."""

    roles: str
    base_bytes: int
    added_bytes: int
    resident_bytes: int
    resident_before: int


def measure(roles: str) -> Rung:
    """Build a model with these roles in this process."""
    import torch
    from transformers import LlamaConfig

    from hydra_ppo.experience import Experience
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.model.roles import Role, Stage

    table = {
        "actor": Role("actor", "lm"),
        "critic": Role("critic", "value"),
        "reference": Role(None, "lm"),
        "reward": Role(None, "reward"),
    }
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    # What torch and transformers themselves take on their first pass is not what is asked for here.
    small = HydraModel.from_config(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64))
    batch = Experience.from_lists([[1, 2, 3]], [[4, 5]], 0, torch.device("cpu")).sequences()
    small.reference_and_reward(batch)
    before = resident()
    names = roles.split(", ")
    stage = Stage("ppo", {name: table[name] for name in names}, tuple(n for n in names if n in ("actor", "critic")))
    model = HydraModel.from_config(config, train=stage)
    with torch.no_grad():
        for name in names:
            with model.role(name):
                model.hidden_states(batch.input_ids)
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    added = sum(size for name, size in sizes.items() if "lora_" in name or name.startswith("heads."))
    return Rung(roles, sum(sizes.values()) - added, added, resident(), before)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure every rung in a fresh process and print the ladder."""
    if len(sys.argv) > 1:
        print(json.dumps(asdict(measure(sys.argv[1]))))
        return
    table = Table(title="Base-copy ladder, MiB", title_justify="left")
    for name in ("roles", "base", "adapters and heads", "resident, model", "step"):
        table.add_column(name, justify="left" if name == "roles" else "right")
    last = None
    for roles in RUNGS:
        done = subprocess.run([sys.executable, "-m", __spec__.name, roles], capture_output=True, text=True, check=True)
        rung = Rung(**json.loads(done.stdout.strip().splitlines()[-1]))
        grown = rung.resident_bytes - rung.resident_before
        cells = [rung.base_bytes, rung.added_bytes, grown]
        table.add_row(roles, *(f"{c / MIB:.1f}" for c in cells), "" if last is None else f"{(grown - last) / MIB:+.1f}")
        last = grown
    print_table(Console(), table)


if __name__ == "__main__":
    main()
