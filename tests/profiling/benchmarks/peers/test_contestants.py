"""Who takes part, and in what."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.benchmarks.peers import run
from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS, Workload, by_default, contestants, matmul

FOLDER = Path(run.__file__).parent
TINY = WORKLOADS["tiny"]
ASIDE = ["hydra-plain", "trl112-full-tuned", "trl112-lora-tuned"]
"""Those that take part only where they are named."""


@pytest.mark.parametrize(("workload", "trunk"), [("w1", 4), ("w2", 2), ("tiny", 1)])
def test_every_contestant_has_its_script(workload, trunk):
    known = contestants(WORKLOADS[workload])
    peers = ["trl112-full", "trl112-lora", "trl011-multi"]
    ours = ["hydra", f"hydra-trunk{trunk}", "hydra-merged"]
    fp32 = [*ours, *peers[:2], "trl112-patched", peers[2]]
    bf16 = [f"{name}-bf16" for name in (*ours, *peers)]
    assert list(known) == [*fp32, *bf16, *ASIDE]
    for name, contestant in known.items():
        assert (FOLDER / contestant.script).is_file()
        assert contestant.dtype == ("bf16" if name.endswith("bf16") else "fp32")
        assert contestant.trunk_layers == (trunk if "trunk" in name else 0)
    assert (FOLDER / matmul("bf16").script).is_file()
    for name in ("hydra-bf16", "trl112-full-bf16", "trl112-lora-bf16", "trl011-multi-bf16"):  # the same but for the type
        assert known[name].options == known[name.removesuffix("-bf16")].options


def test_who_takes_part_by_default():
    assert by_default(WORKLOADS["w1"]) == [name for name in contestants(WORKLOADS["w1"]) if name not in ASIDE]
    assert by_default(WORKLOADS["w2"]) == [
        "hydra",
        "hydra-trunk2",
        "hydra-merged",
        "trl112-full",
        "trl112-lora",
        "trl011-multi",
    ]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_micro_batches_fill_the_minibatch(workload):
    assert workload.rows % workload.microbatch == 0
    assert {len(prompt) for prompt in workload.prompts(3)} == {workload.prompt_tokens}
    assert workload.prompts(3) == workload.prompts(3)


def test_choice_of_contestants():
    both = [WORKLOADS["w1"], WORKLOADS["w2"]]

    def names(workloads: list[Workload], only: list[str]) -> list[list[str]]:
        return [[c.name for c in found] for found in run.choose(workloads, only).values()]

    assert names([TINY], ["trl011-multi", "hydra"]) == [["hydra", "trl011-multi"]]
    assert names(both, ["hydra", "hydra-trunk2"]) == [["hydra"], ["hydra", "hydra-trunk2"]]
    assert [len(found) for found in names(both, [])] == [13, 6]
    with pytest.raises(ConfigError, match=r"only='hydra-trunk4' is no contestant of tiny; choose among hydra, hydra-trunk1"):
        run.choose([TINY], ["hydra-trunk4"])
    with pytest.raises(ConfigError, match="only=hydra-trunk4 leaves nobody for W2"):
        run.choose(both, ["hydra-trunk4"])
