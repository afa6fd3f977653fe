"""A profile of a step is right to the byte where it can be counted by hand, and a simulation agrees with a real run."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType

import pytest
import torch

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.roles import Role, Stage
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.record import Peak
from hydra_ppo.profiling.subjects.subjects import _tokens
from tests.profiling.models import CONFIGS, workload

AGREEMENT = 0.005
"""Largest relative difference between a simulated and a measured peak."""


def assert_adds_up(peak: Peak) -> None:
    assert sum(peak.kinds.values()) == peak.bytes
    assert sum(sum(kinds.values()) for kinds in peak.by_role.values()) == peak.bytes


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "gpt2", "opt", "gemma3"])
def test_simulated_and_measured_peaks_agree_in_each_phase(family, quantization):
    sizes = workload(quantization=quantization, rollout_batch=6, microbatch=2, score_batch=2)
    simulated = capture(sizes, simulate=True, config=CONFIGS[family])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS[family])
    assert simulated.phases.keys() == measured.phases.keys()
    for phase, peak in measured.phases.items():
        assert_adds_up(peak)
        assert_adds_up(simulated.phases[phase])
        if phase == "load" and (quantization or CONFIGS[family].tie_word_embeddings):
            continue  # from_pretrained is simulated: it ties and quantises as weights arrive; random ones are made all at once
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated.floor_bytes == measured.floor_bytes
    assert simulated.static_bytes == measured.static_bytes


@pytest.mark.parametrize(
    ("method", "changes"),
    [("full", {}), ("lora", {"checkpointing": False}), ("dlora", {}), ("j-hydra", {}), ("hydra", {"trunk_layers": 2})],
)
def test_simulated_and_measured_peaks_agree_for_each_method(method, changes):
    sizes = workload(microbatch=2, **changes)
    simulated = capture(sizes, method, simulate=True, config=CONFIGS["llama"])
    measured = capture(sizes, method, simulate=False, device="cpu", config=CONFIGS["llama"])
    for phase, peak in measured.phases.items():
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase


def test_simulated_and_measured_peaks_agree_in_fp16():
    """Whose loss is scaled, from the warm-up on."""
    simulated, measured = (
        capture(workload(dtype="fp16"), simulate=s, config=CONFIGS["llama"], device="cpu") for s in (True, False)
    )
    for phase in measured.phases.keys() - {"load"}:
        assert simulated.phases[phase].bytes == pytest.approx(measured.phases[phase].bytes, rel=AGREEMENT), phase


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "gemma3"])
def test_simulated_and_measured_peaks_agree_with_quantised_embeddings(family, kind):
    sizes = workload(quantization="nf4", dtype="bf16", quantize_embeddings=kind)
    simulated = capture(sizes, simulate=True, config=CONFIGS[family])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS[family])
    for phase, peak in measured.phases.items():
        if phase != "load":  # random weights are made all at once
            assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated.static_bytes == measured.static_bytes
    plain = capture(replace(sizes, quantize_embeddings=None), simulate=True, config=CONFIGS[family])
    numbers = 2000 * 128 * (1 if family == "qwen3-tied" else 2) // (2 if family == "gemma3" else 1)
    byte_each = (1 if kind == "int8" else 0.5) + 2 / 64
    assert plain.static_bytes - simulated.static_bytes == pytest.approx(numbers * (2 - byte_each), abs=16)


def test_rows_of_a_rollout_have_prompts_of_their_own():
    """Equal ones would be run once, and the peak of sampling would look smaller than that of a real run."""
    assert len({_tokens(64, row) for row in range(512)}) == 512
    assert {len(_tokens(count, 7)) for count in (1, 2, 64)} == {1, 2, 64}


def test_the_floor_is_what_the_shapes_say():
    found = capture(workload(), simulate=True, config=CONFIGS["llama"])
    base = HydraModel.from_config(CONFIGS["llama"]).causal_lm
    base_numbers = sum(p.numel() for n, p in base.named_parameters() if "lora_" not in n)
    # Per layer and adapter, r = 8: q 128+128, k and v 128+64, o 128+128, gate and up 128+384, down 384+128 inputs and outputs
    lora = 8 * 4 * (2 * 256 + 2 * 192 + 3 * 512)
    buffers = sum(b.numel() * b.element_size() for b in base.buffers())
    static = 4 * (base_numbers + 2 * lora + 2 * 128) + buffers  # two adapters, value and reward head
    assert found.static_bytes == static
    trained = 4 * (2 * lora + 128)
    steps = 4 * (2 * 4 * 7 * 2 + 1)  # AdamW keeps a step count per tensor: 2 matrices, 7 layers, 4 blocks, 2 adapters; the head
    assert found.floor_bytes == static + 3 * trained + steps
    kinds = found.phases["optimizer"].kinds
    assert kinds["adapters"] == 4 * 2 * lora
    assert kinds["gradients"] == trained
    assert found.peak_bytes > found.floor_bytes


@pytest.mark.parametrize("simulate", [True, False])
def test_a_leaked_logits_tensor_is_named_with_its_phase_and_kind(simulate):
    leaked = []

    def leak(model: HydraModel) -> None:
        plain = model.logprobs

        def logprobs(self, sequences, *args, **kwargs):
            hidden = torch.zeros(*sequences.input_ids.shape, self.architecture.hidden_size)
            leaked.append(torch.nn.functional.linear(hidden, self.architecture.output_embeddings.weight))  # (B, T, V)
            return plain(sequences, *args, **kwargs)

        model.logprobs = MethodType(logprobs, model)

    found = capture(workload(microbatch=2), simulate=simulate, device="cpu", config=CONFIGS["llama"], on_model=leak)
    leaked.clear()
    worst = found.phases["optimizer"].largest[0]
    assert worst.shape == (2 * 36, 2000)  # B T x V: the product's own shape, of which (B, T, V) is a view
    assert (worst.phase, worst.kind, worst.role) == ("update-actor", "activations", "actor")
    clean = capture(workload(microbatch=2), simulate=simulate, device="cpu", config=CONFIGS["llama"])
    assert all(2000 not in tensor.shape for tensor in clean.phases["optimizer"].largest)


def test_a_full_update_repeats_the_peak_of_two_microbatches():
    """What a simulation leaves out adds nothing: a real step over six micro-batches has the peak of one over two."""
    peaks = [
        capture(workload(rollout_batch=rows, minibatch=rows), simulate=False, device="cpu", config=CONFIGS["llama"])
        for rows in (2, 6)
    ]
    for phase in ("update-actor", "update-critic"):
        few, many = (found.phases[phase].bytes for found in peaks)
        assert many == pytest.approx(few, rel=0.005)  # the experience of four more rows


def test_roles_cost_adapters_and_heads_not_bases():
    """The base-copy ladder: actor; actor and critic; all four roles."""
    actor, critic = Role("actor", "lm"), Role("critic", "value")
    rungs = [
        Stage("ppo", {"actor": actor}, ("actor",)),
        Stage("ppo", {"actor": actor, "critic": critic}, ("actor", "critic")),
        Stage(
            "ppo",
            {"actor": actor, "critic": critic, "reference": Role(None, "lm"), "reward": Role(None, "reward")},
            ("actor", "critic"),
        ),
    ]
    sizes = [sum(p.numel() for p in HydraModel.from_config(CONFIGS["llama"], train=stage).parameters()) for stage in rungs]
    adapter = 16 * 4 * (2 * 256 + 2 * 192 + 3 * 512)
    assert sizes[1] - sizes[0] == adapter
    assert sizes[2] - sizes[1] == 0  # both scalar heads are there from the start


def test_methods_hold_as_many_bases_as_their_table_says():
    base = capture(workload(), simulate=True, config=CONFIGS["qwen3-tied"]).phases["optimizer"].kinds["base weights"]
    for method, bases in {"full": 4, "lora": 4, "dlora": 2, "j-hydra": 1}.items():
        found = capture(workload(), method, simulate=True, config=CONFIGS["qwen3-tied"])
        assert found.phases["optimizer"].kinds["base weights"] == bases * base, method


def test_full_fine_tuning_holds_gradients_and_moments_of_two_bases():
    found = capture(workload(), "full", simulate=True, config=CONFIGS["qwen3-tied"])
    kinds = found.phases["optimizer"].kinds
    trained = kinds["gradients"]
    assert trained == pytest.approx(kinds["base weights"] / 2, rel=0.01)
    assert kinds["optimizer"] == pytest.approx(2 * trained, rel=0.01)


def test_a_reward_model_by_lora_needs_less_than_by_all_weights():
    found = {m: capture(workload(), m, simulate=True, stage="reward", config=CONFIGS["llama"]) for m in ("full", "lora")}
    assert found["lora"].floor_bytes < 0.5 * found["full"].floor_bytes
    assert set(found["lora"].phases) == {"load", "update", "optimizer"}
    measured = capture(workload(), "lora", simulate=False, device="cpu", stage="reward", config=CONFIGS["llama"])
    for phase, peak in measured.phases.items():
        assert found["lora"].phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase


def test_real_runs_are_timed_without_the_tracker():
    found = capture(workload(), simulate=False, device="cpu", config=CONFIGS["llama"], timed_steps=1)
    assert found.responses_per_second > 0
    assert capture(workload(), simulate=True, config=CONFIGS["llama"], timed_steps=1).responses_per_second is None


def test_a_quantised_base_cannot_be_fully_trained():
    with pytest.raises(ConfigError, match="quantization='nf4' leaves no weights that the method 'full' could train"):
        capture(workload(quantization="nf4"), "full", simulate=True, config=CONFIGS["llama"])


def test_nothing_fake_stays_behind():
    capture(workload(quantization="nf4"), simulate=True, config=CONFIGS["llama"])
    import bitsandbytes.functional as bnb

    assert all(type(table) is torch.Tensor for table in bnb.name2qmap.values())
    assert torch.zeros(2).tolist() == [0.0, 0.0]
    model = HydraModel.from_config(CONFIGS["llama"], quantization="nf4").to("cpu")
    assert type(next(model.parameters())) is torch.nn.Parameter


@pytest.mark.parametrize("changes", [{"advantage": "group"}, {"advantage": "reinforce", "ema": True}, {"ema": True}], ids=str)
def test_simulated_and_measured_peaks_agree_without_a_critic_and_with_a_running_mean(changes):
    sizes = workload(rollout_batch=4, microbatch=2, score_batch=2, **changes)
    simulated = capture(sizes, simulate=True, config=CONFIGS["llama"])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS["llama"])
    assert simulated.phases.keys() == measured.phases.keys()
    assert ("update-critic" in measured.phases) == (sizes.advantage == "gae")
    for phase, peak in measured.phases.items():
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    plain = capture(workload(rollout_batch=4, microbatch=2, score_batch=2), simulate=True, config=CONFIGS["llama"])
    adapters = [found.phases["optimizer"].kinds["adapters"] for found in (simulated, plain)]
    expected = {"{'ema': True}": 3 / 2, "{'advantage': 'group'}": 1 / 2}.get(str(changes), 1)
    assert adapters[0] == expected * adapters[1]


@pytest.mark.parametrize("microbatch", [1, 2])
def test_simulated_and_measured_peaks_agree_where_answers_are_practised(microbatch):
    """While practised answers gather theirs, the actor's gradients of PPO are there too."""
    sizes = workload(rollout_batch=4, microbatch=microbatch, score_batch=2, ptx=True)
    simulated = capture(sizes, simulate=True, config=CONFIGS["llama"])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS["llama"])
    for phase, peak in measured.phases.items():
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    plain = capture(replace(sizes, ptx=False), simulate=False, device="cpu", config=CONFIGS["llama"])
    assert measured.phases["update-actor"].bytes > plain.phases["update-actor"].bytes
    with pytest.raises(ConfigError, match="ptx=True is of the method 'hydra'; leave 'full' out of methods"):
        sizes.check_method("full")
    with pytest.raises(ConfigError, match=r"ptx=True has nothing to do in stage='reward'; leave it out\.$"):
        sizes.check_stage("reward")


def test_what_has_no_critic_has_no_order_of_roles():
    with pytest.raises(ConfigError, match=r"^update_order='in-turn' .* advantage='group' has none; leave it out\.$"):
        workload(advantage="group", update_order="in-turn", rollout_batch=4)
    with pytest.raises(ConfigError, match="advantage='group' is of the method 'hydra'; leave 'full' out of methods"):
        workload(advantage="group", rollout_batch=4).check_method("full")
