"""MLPs and norms over pieces compute what they did, and make nothing wide that is longer than a piece."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from hydra_ppo.compute import tiled_mlp, tiled_norm
from hydra_ppo.compute.gated_mlp import activation_of
from hydra_ppo.compute.tiled_mlp import TiledForward
from hydra_ppo.compute.tiled_norm import TiledNorm
from hydra_ppo.config.settings import ModelSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.runtime.memory import LiveBytes
from tests.families import FAMILIES, randomise, sequences
from tests.hydra_ppo.compute.test_gated_mlp import GATED, in_todays_shape

TILE = 4
"""Tokens of a piece; the packed rows have 24 tokens, the padded ones 27 and a last piece of 3."""
RELATIVE = 3e-6
"""Largest difference of a gradient from the whole pass, of its largest entry: in fp32 sums in another order."""


def build(family: str = "llama", tile: int | None = TILE, **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], tile_tokens=tile, **options)
    randomise(model)
    return model


def results(model: HydraModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probs, values, and the gradients of both trainable roles."""
    with model.role("actor"):
        logprobs = model.logprobs(sequences()).logprobs
    with model.role("critic"):
        values = model.values(sequences())
    (logprobs.sum() + values.sum()).backward()
    return logprobs, values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected) -> None:
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert found[2].keys() == expected[2].keys() != set()
    for name, gradient in expected[2].items():
        away = (found[2][name] - gradient).abs().max() / gradient.abs().max()
        assert away < RELATIVE, (name, away)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_whole_pass(family, quantization, checkpointing):
    found = []
    for tile in (TILE, None):
        model = build(family, tile, quantization=quantization)
        model.enable_checkpointing(checkpointing)
        found.append(results(model))
    assert_close(*found)


@pytest.mark.parametrize("options", [{"trunk_layers": 1}, {"packing": False}, {"quantization": "int8"}], ids=str)
def test_with(options):
    # int8 rounds activations, so that another order of a sum can take another step.
    found = [results(build("llama", tile, **options)) for tile in (TILE, None)]
    assert_close(*found)


def test_scoring_passes_give_the_same_numbers():
    found = []
    for tile in (TILE, None):
        with torch.no_grad():
            found.append(build("llama", tile).reference_and_reward(sequences()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@in_todays_shape
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", GATED)
def test_nothing_is_tokens_by_intermediate_size(family, grad):
    wide = FAMILIES[family].intermediate_size
    longest = []
    for tile in (TILE, None):
        model = build(family, tile, check="off", packing=False)
        model.enable_checkpointing(grad)
        with Tracker() as tracker, torch.set_grad_enabled(grad), model.role("actor"):
            loss = model.logprobs(sequences()).logprobs.sum()
            if grad:
                loss.backward()
        made = [s for s in tracker.storages if s.operation and len(s.shape) > 1 and s.shape[-1] == wide]
        rank = 16
        longest.append(max(s.bytes // 4 // wide for s in made if s.shape[-2] not in (rank, 64)))
    assert longest == [TILE, sequences().input_ids.numel()]


@in_todays_shape
def test_without_checkpointing_the_input_is_kept_in_place_of_gate_and_up():
    """The norm's output, which gate and up read: once. Norms keep their input, the residual stream, which is there anyway."""
    kept = []
    for tile in (TILE, None):
        model = build("llama", tile)
        live = LiveBytes(model.parameters())
        with live, model.role("actor"):
            hidden = model.hidden_states(sequences().input_ids)
            kept.append(live.bytes)
        del hidden
    config, tokens = FAMILIES["llama"], sequences().input_ids.numel()
    assert kept[1] - kept[0] >= 2 * tokens * config.intermediate_size * 4 * config.num_hidden_layers


def test_a_graph_can_be_gone_back_through_twice():
    mlp = build("llama").architecture.layers[0].mlp
    x = torch.randn(1, 11, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = mlp(x).square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(first, torch.autograd.grad(mlp.forward.inner(x).square().sum(), x)[0], rtol=1e-5, atol=1e-6)


@in_todays_shape
def test_under_checkpointing_an_mlp_runs_forward_once(monkeypatch):
    """Its recomputation ends where its input is known; what the backward pass needs of it, that makes anew."""
    runs = []
    plain = TiledForward.pieces
    monkeypatch.setattr(TiledForward, "pieces", lambda *args: runs.append(1) or plain(*args))
    for checkpointing in (False, True):
        model = build("llama", check="off")
        model.enable_checkpointing(checkpointing)
        runs.clear()
        with model.role("actor"):
            model.logprobs(sequences()).logprobs.sum().backward()
        assert len(runs) == FAMILIES["llama"].num_hidden_layers


def test_a_piece_and_less_runs_as_ever():
    mlp = build("llama").architecture.layers[0].mlp
    x = torch.randn(1, TILE, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp(x), mlp.forward.inner(x), rtol=0, atol=0)


def test_copies_run_their_own_weights():
    model = build("llama")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = twin.architecture.layers[0].mlp
        assert mlp.forward.mlp is mlp
        norm = twin.architecture.layers[0].input_layernorm
        assert norm.forward.norm is norm
        with twin.role("actor"), torch.no_grad():
            mine = twin.logprobs(sequences()).logprobs
        with model.role("actor"), torch.no_grad():
            torch.testing.assert_close(mine, model.logprobs(sequences()).logprobs, rtol=0, atol=0)


@in_todays_shape
def test_the_decoder_that_knows_gated_mlps_still_does():
    from hydra_ppo.rollout.lean_decoding import supports

    model = build("llama")
    assert activation_of(model.architecture.layers[0].mlp) is not None
    assert supports(model)


# -- what is not run over pieces is said -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "what"),
    [
        ("gpt2", {}, "mlp (GPT2MLP) in 3 of 3 layers of GPT2LMHeadModel run"),
        ("opt", {}, "fc1 (Linear) and fc2 (Linear) in 3 of 3 layers of OPTForCausalLM run"),
        ("phi3", {}, "mlp (Phi3MLP) in 3 of 3 layers of Phi3ForCausalLM run"),
        ("llama", {"quantization": "int8"}, "mlp (LlamaMLP) in 3 of 3 layers of LlamaForCausalLM run"),
        ("llama", {"train": "base"}, "LlamaForCausalLM is trained itself, so that its layers are run whole"),
        ("llama", {"quantization": "nf4"}, None),
        *(((family, {}, None)) for family in GATED),
    ],
    ids=str,
)
@in_todays_shape
def test_what_is_run_whole_is_said_in_one_line(family, options, what, caplog):
    with caplog.at_level(logging.WARNING, logger="hydra_ppo"):
        build(family, **options)
    said = [record.getMessage() for record in caplog.records if "tile_tokens" in record.getMessage()]
    assert len(said) == (what is not None)
    if what is not None:
        assert said[0].startswith(f"model.tile_tokens={TILE}: {what}")


def test_experts_are_run_whole_and_a_shared_one_is_not(caplog):
    from transformers import Qwen2MoeConfig

    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**FAMILIES["llama"].to_diff_dict() | sizes | {"model_type": "qwen2_moe"})
    with caplog.at_level(logging.WARNING, logger="hydra_ppo"):
        model = HydraModel.from_config(config, tile_tokens=TILE)
    assert any(isinstance(vars(m).get("forward"), TiledForward) for m in model.architecture.layers.modules())
    assert any("mlp (Qwen2MoeSparseMoeBlock) in" in record.getMessage() for record in caplog.records)


def test_what_turns_up_in_a_pass_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(tiled_mlp, "_said", set())
    model = build("llama", check="off")
    mlp = model.architecture.layers[0].mlp
    x = torch.randn(1, 9, 64)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hydra_ppo"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            mlp(x)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"model.tile_tokens={TILE}: an MLP that runs under autocast or has hooks is run whole"]


@pytest.mark.parametrize("tokens", [0, -3])
def test_pieces_have_tokens(tokens):
    with pytest.raises(ConfigError, match=f"model.tile_tokens={tokens} must be greater than 0; set"):
        build("llama", tokens)
    with pytest.raises(ConfigError, match=f"tile_tokens={tokens} must be greater than 0; set"):
        ModelSettings(name_or_path="base", tile_tokens=tokens)


# -- norms ---------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """An RMS norm as transformers writes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ScaledRMSNorm(Scaled):
    pass


@pytest.mark.parametrize("norm", [ScaledRMSNorm(32), nn.LayerNorm(32, dtype=torch.bfloat16).requires_grad_(False)])
@pytest.mark.parametrize("shape", [(3, 7, 32), (21, 32), (2, 5, 4, 32)])
def test_a_norm_gives_the_same_bits(norm, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    pieces = TiledNorm(norm, 5 * 32)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = pieces(x), norm(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(pieces(x), expected, rtol=0, atol=0)


def test_a_norm_keeps_its_input_alone_and_copies_a_piece():
    norm, x = ScaledRMSNorm(64), torch.ones(1, 100, 64, dtype=torch.bfloat16, requires_grad=True)
    wide = []
    for forward in (TiledNorm(norm, 10 * 64), norm):
        live = LiveBytes([x, norm.weight])
        before = live.bytes
        with live, Tracker() as tracker:
            y = forward(x)
            kept = live.bytes - before - x.numel() * 2  # beside y
            wide.append((kept, max(s.shape[-2] for s in tracker.storages if s.dtype == torch.float32 and s.shape[-1] == 64)))
        del y
    assert wide[0] == (0, 10)
    assert wide[1][0] > x.numel() * 4
    assert wide[1][1] == 100


def test_a_norm_that_is_trained_runs_as_ever():
    norm = nn.LayerNorm(8)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    TiledNorm(norm, 8)(x).square().sum().backward()
    assert norm.weight.grad is not None


def test_norms_that_take_more_are_left_alone():
    class GatedRMSNorm(Scaled):
        def forward(self, x, gate=None):
            return super().forward(x)

    model = nn.ModuleList([ScaledRMSNorm(8), GatedRMSNorm(8), nn.Linear(8, 8)])
    tiled_norm.use_tiled_norms(model, 16)
    assert ["forward" in vars(module) for module in model] == [True, False, False]
    assert [tiled_norm.runs_its_own(module) for module in model] == [True] * 3
