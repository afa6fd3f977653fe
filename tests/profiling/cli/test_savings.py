"""The ladder of savings: numbers of a model by hand, and what each rung takes off as shapes say."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console
from transformers import LlamaConfig

from hydra_ppo.profiling.cli import savings
from hydra_ppo.profiling.cli.savings import climb, shapes_of, table_of
from hydra_ppo.profiling.workload import Workload

SMALL = LlamaConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)


def test_numbers_by_hand():
    found = shapes_of(SMALL, rank=8)
    assert found.vocabulary == 2 * 4096 * 256
    # q 256 + 256, k and v 256 + 128, o 256 + 256, gate and up 256 + 512, down 512 + 256, of four layers
    assert found.adapter == 8 * 4 * (2 * 512 + 2 * 384 + 3 * 768)
    assert found.cached == 2 * 4 * 2 * 64
    assert found.heads == 2 * 4 * 2


def test_what_rungs_take_off_is_what_shapes_say(monkeypatch, tmp_path):
    few = ("today's defaults", "model.quantize_embeddings: int8", "rollout.kv_cache: int8")
    monkeypatch.setattr(savings, "RUNGS", {name: savings.RUNGS[name] for name in few})
    SMALL.save_pretrained(tmp_path)
    workload = Workload(model=str(tmp_path), quantization="nf4", prompt=48, response=48, rollout_batch=4)
    rungs = climb(workload)
    assert [rung.name for rung in rungs] == list(few)
    for before, rung in pairwise(rungs):
        assert rung.expected
        for phase, gain in rung.expected.items():
            if "embeddings" in rung.name and phase not in ("update-critic", "optimizer"):
                continue  # so small a head is one block, which log-probs make whole
            assert before.phases[phase] - rung.phases[phase] == pytest.approx(gain, rel=0.1), (rung.name, phase)
    console = Console(width=200, record=True)
    console.print(table_of("small", rungs))
    assert "rollout.kv_cache: int8" in console.export_text()
    first, last = climb(workload, ends=True)
    assert (first.phases, last.phases) == (rungs[0].phases, rungs[-1].phases)
