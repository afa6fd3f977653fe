"""Multiply-adds counted by hand."""

from __future__ import annotations

from dataclasses import replace

from hydra_ppo.profiling.benchmarks.peers.floor import attention, layer_linears, multiply_adds, shares
from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS, Workload

SHAPE = Workload("x", 4, 6, 2, 2, 1, 10, rows=1, prompt_tokens=1, response_tokens=2, epochs=1, microbatch=1)
"""Two heads of 2, one of them for keys and values; rows of 3 tokens."""


def test_parts_by_hand():
    assert [layer.frozen for layer in layer_linears(SHAPE)] == [16, 8, 8, 16, 24, 24, 24]  # 120 together
    assert [layer.lora(1) for layer in layer_linears(SHAPE)] == [8, 6, 6, 8, 10, 10, 10]  # 58
    # A row of 3 has 1 + 2 + 3 = 6 pairs, each 4 for its score and 4 for its value.
    assert (attention(SHAPE, 3), attention(SHAPE, 2)) == (48, 24)


def test_phases_by_hand():
    assert multiply_adds(SHAPE, 0, rank=1) == {
        # 2 layers of 2 tokens, their LoRA, the head (4 x 10) on 2 tokens
        "rollout": 2 * (2 * 120 + 24) + 2 * 2 * 58 + 80,
        # reference with the head; critic with LoRA
        "score": 2 * (3 * 120 + 48) + 80 + 2 * (3 * 120 + 48) + 2 * 3 * 58,
        "update": 2 * (816 + 348)  # forward passes of actor and critic
        + 2 * 2 * 3 * 120  # gradients of the inputs of frozen weights,
        - 2 * 3 * (16 + 8 + 8)  # but not of the first q, k and v
        + 2 * 2 * 2 * 48  # attention: twice its forward pass
        + 2 * 2 * 348  # LoRA: A, B, between them, input,
        - 2 * 3 * 3 * 4  # but not the first inputs of q, k and v
        + 2 * 80,  # the actor's head, forward and gradient
    }


def test_trunk_runs_in_rollout_and_first_scoring_pass_only():
    assert multiply_adds(SHAPE, 1, rank=1) == {
        "rollout": 2 * (2 * 120 + 24) + 2 * 58 + 80,
        "score": 2 * (3 * 120 + 48) + 80 + (3 * 120 + 48) + 3 * 58,
        "update": 2 * (408 + 174 + 360 - 96 + 96 + 348 - 36) + 2 * 80,
    }


def test_work_grows_with_rows_and_epochs():
    once, more = multiply_adds(SHAPE, 1), multiply_adds(replace(SHAPE, rows=3, epochs=2), 1)
    assert more == {"rollout": 3 * once["rollout"], "score": 3 * once["score"], "update": 6 * once["update"]}


def test_shares_by_hand():
    found = shares({"rollout": 10, "score": 20, "update": 70}, {"rollout": 2.0, "score": 2.0, "update": 16.0}, rate=10.0)
    # 1 of 2, 2 of 2 and 7 of 16 seconds; 10 of 20
    assert found == {"rollout": 0.5, "score": 1.0, "update": 0.4375, "whole": 0.5}


def test_merged_copies_leave_adapters_out_of_decoding_alone():
    workload = WORKLOADS["w1"]
    plain, merged = multiply_adds(workload, 0), multiply_adds(workload, 0, merged_rollout=True)
    assert {phase for phase in plain if plain[phase] != merged[phase]} == {"rollout"}
    # Per layer r (in + out) of q, o (512, 512), k, v (512, 256), gate, up (512, 1536) and down (1536, 512), r = 16.
    per_token = 8 * 16 * (2 * 1024 + 2 * 768 + 3 * 2048)
    assert plain["rollout"] - merged["rollout"] == 16 * 63 * per_token
