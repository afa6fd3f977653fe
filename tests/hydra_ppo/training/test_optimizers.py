"""The ways to keep AdamW's moments: the same bits where they promise it, few bytes where they promise that, and resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hydra_ppo.config.settings import OptimizerSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.runtime.host_tensors import is_on_host
from hydra_ppo.training import eight_bit, offloaded
from hydra_ppo.training.away import bring_back, send_away
from hydra_ppo.training.offloaded import OffloadedAdamW
from hydra_ppo.training.optim import build_optimizer, load_optimizer, save_optimizer, state_tensors
from hydra_ppo.training.packed import ALIGNMENT, Layout

ON_CPU = ("adamw", "adamw-8bit", "adamw-offloaded")
SHAPES = [(64, 80), (33,), (5, 7, 3), (1,), (128, 64), (70, 70)]
"""Of odd sizes too, and on both sides of the 4096 numbers from which moments have 8 bits."""


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def build(mine, name="adamw", **changes):
    settings = replace(OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, schedule="linear", name=name), **changes)
    named = {f"p{i}": p for i, p in enumerate(mine)}
    groups = [({n: named[n] for n in ("p0", "p1", "p2")}, 1e-2), ({n: named[n] for n in ("p3", "p4", "p5")}, 3e-2)]
    return *build_optimizer(groups, settings, 20), {id(p): n for n, p in named.items()}


def give_gradients(mine, step):
    """The second parameter has none in the first two steps, the last none in every third."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(mine):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        missing = (number == 1 and step < 2) or (number == 5 and step % 3 == 0)
        parameter.grad = None if missing else gradient


def run(optimizer, schedule, mine, steps):
    for step in steps:
        give_gradients(mine, step)
        optimizer.step()
        schedule.step()


def assert_same(mine, others):
    for number, (one, other) in enumerate(zip(mine, others, strict=True)):
        assert torch.equal(one, other), number


@pytest.fixture(params=[8 * 2**20, 64 * 1024, 1], ids=["one bucket", "some", "one each"])
def buckets(request, monkeypatch):
    monkeypatch.setattr(offloaded, "BUCKET_BYTES", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offloaded_moments_give_the_bits_of_adamw(dtype, buckets):
    plain, mine = parameters(dtype), parameters(dtype)
    adamw, off = build(plain), build(mine, "adamw-offloaded")
    run(*adamw[:2], plain, range(7))
    run(*off[:2], mine, range(7))
    assert_same(mine, plain)
    assert not torch.equal(plain[1], parameters(dtype)[1])
    for one, other in zip(plain, mine, strict=True):
        kept, state = adamw[0].state[one], off[0].state[other]
        assert kept.keys() == state.keys()
        for kind, value in kept.items():
            assert torch.equal(value, state[kind])
            assert value.dtype == state[kind].dtype
            assert is_on_host(state[kind]) == (kind != "step")


def test_offloaded_moments_lie_as_their_parameters_do():
    """A transposed parameter and a kernel that goes through memory in one line."""
    plain, mine = (nn.Parameter(torch.arange(12.0).reshape(3, 4).T) for _ in range(2))
    adamw, off = torch.optim.AdamW([plain], fused=True), OffloadedAdamW([mine])
    for step in range(3):
        for parameter, optimizer in ((plain, adamw), (mine, off)):
            parameter.grad = torch.empty_like(parameter).copy_(torch.arange(12.0).reshape(4, 3) - step)
            optimizer.step()
    assert torch.equal(plain, mine)
    assert off.state[mine]["exp_avg"].stride() == adamw.state[plain]["exp_avg"].stride() == (1, 4)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_scaler_finds_the_same_protocol(found_inf, buckets):
    """grad_scale divides inside the kernel; where an infinity was found nothing changes, the count of steps included."""
    plain, mine = parameters(), parameters()
    adamw, off = build(plain)[0], build(mine, "adamw-offloaded")[0]
    for listed, optimizer in ((plain, adamw), (mine, off)):
        give_gradients(listed, 2)
        optimizer.step()
        before = [p.detach().clone() for p in listed]
        give_gradients(listed, 4)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        assert torch.equal(listed[0], before[0]) == bool(found_inf)
        assert optimizer.state[listed[0]]["step"].item() == (1 if found_inf else 2)
    assert_same(mine, plain)


def test_a_true_scaler_steps_and_skips_alike():
    runs = []
    for name in ("adamw", "adamw-offloaded"):
        mine = parameters()
        optimizer = build(mine, name)[0]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            give_gradients(mine, step)
            if step == 2:
                mine[0].grad[0, 0] = float("inf")
            scaler.scale(torch.zeros(()))  # makes the scale
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0
        runs.append(mine)
    assert_same(*runs)


def test_state_that_was_loaded_by_torch_s_own_way_is_on_the_host(buckets):
    plain, mine = parameters(), parameters()
    adamw, off = build(plain)[0], build(mine, "adamw-offloaded")[0]
    give_gradients(plain, 3)
    adamw.step()
    with torch.no_grad():
        for one, other in zip(plain, mine, strict=True):
            other.copy_(one)
    off.load_state_dict(adamw.state_dict())
    assert all(is_on_host(off.state[p]["exp_avg_sq"]) for p in mine if p in off.state)
    for listed, optimizer in ((plain, adamw), (mine, off)):
        give_gradients(listed, 4)
        optimizer.step()
    assert_same(mine, plain)


def test_memory_that_runs_out_before_the_step_changes_nothing(monkeypatch):
    mine, plain = parameters(), parameters()
    off, adamw = build(mine, "adamw-offloaded")[0], build(plain)[0]
    make, made = offloaded.empty_on_host, []

    def fail_once(like):
        made.append(1)
        if len(made) == 2:
            raise RuntimeError("CUDA error: out of memory")
        return make(like)

    monkeypatch.setattr(offloaded, "empty_on_host", fail_once)
    give_gradients(mine, 3)
    with pytest.raises(RuntimeError, match="out of memory"):
        off.step()
    assert_same(mine, parameters())
    off.step()
    give_gradients(plain, 3)
    adamw.step()
    assert_same(mine, plain)


def test_an_8_bit_step_that_ran_out_of_memory_can_be_tried_again(monkeypatch):
    mine, whole = parameters(), parameters()
    optimizer, plain = build(mine, "adamw-8bit")[0], build(whole, "adamw-8bit")[0]
    make, made = type(optimizer).get_state_buffer, []

    def fail_once(self, p, dtype=torch.float32):
        made.append(1)
        if len(made) == 4:  # the second moment of the second parameter
            raise RuntimeError("can't allocate memory")
        return make(self, p, dtype)

    monkeypatch.setattr(type(optimizer), "get_state_buffer", fail_once)
    give_gradients(mine, 4)
    with pytest.raises(RuntimeError, match="allocate"):
        optimizer.step()
    assert_same(mine, parameters())
    optimizer.step()
    give_gradients(whole, 4)
    plain.step()
    assert_same(mine, whole)


def test_8_bit_moments_are_near_those_of_adamw_and_small_ones_are_fp32():
    plain, mine = parameters(), parameters()
    run(*build(plain)[:2], plain, range(6))
    optimizer, schedule, _ = build(mine, "adamw-8bit")
    run(optimizer, schedule, mine, range(6))
    for one, other, start in zip(plain, mine, parameters(), strict=True):
        state = optimizer.state[other]
        assert state["state1"].dtype == (torch.uint8 if other.numel() >= 4096 else torch.float32)
        moved = (one - start).norm()
        assert (other - one).norm() < (0.1 if other.numel() >= 4096 else 1e-4) * moved


def test_bytes_by_hand():
    """64 x 80, 128 x 64 and 70 x 70 have 8 bits, 33, 105 and 1 have not; scales for each 256, two tables of 1 KiB."""
    mine = parameters()
    optimizer, schedule, _ = build(mine, "adamw-8bit")
    run(optimizer, schedule, mine, [4])
    large, small = 64 * 80 + 128 * 64 + 70 * 70, 33 + 105 + 1
    scales = 20 + 32 + 20  # 4900 / 256 is 19.1
    assert sum(t.numel() * t.element_size() for t in state_tensors(optimizer)) == 2 * large + 8 * small + 8 * scales + 2048
    off, schedule, _ = build(mine, "adamw-offloaded")
    run(off, schedule, mine, [4])
    held = [t for t in state_tensors(off) if not is_on_host(t)]
    assert sum(t.numel() * t.element_size() for t in held) == 4 * len(SHAPES)  # counts of steps


@pytest.mark.parametrize("name", ON_CPU)
def test_a_run_in_two_parts_has_the_bits_of_one(name):
    whole, first = parameters(), parameters()
    run(*build(whole, name)[:2], whole, range(9))
    optimizer, schedule, names = build(first, name)
    run(optimizer, schedule, first, range(4))
    tensors, values = save_optimizer(optimizer, schedule, names)
    tensors = {kind: value.clone() for kind, value in tensors.items()}
    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer, schedule, names = build(second, name)
    load_optimizer(optimizer, schedule, names, tensors, values)
    run(optimizer, schedule, second, range(4, 9))
    assert_same(second, whole)


@pytest.mark.parametrize("names", [("adamw", "adamw-offloaded"), ("adamw-offloaded", "adamw")], ids=str)
def test_moments_may_be_offloaded_and_back_in_the_middle_of_a_run(names):
    whole, mine = parameters(), parameters()
    run(*build(whole)[:2], whole, range(9))
    optimizer, schedule, ids = build(mine, names[0])
    run(optimizer, schedule, mine, range(4))
    saved = save_optimizer(optimizer, schedule, ids)
    optimizer, schedule, ids = build(mine, names[1])
    load_optimizer(optimizer, schedule, ids, *saved)
    run(optimizer, schedule, mine, range(4, 9))
    assert_same(mine, whole)


@pytest.mark.parametrize(
    ("name", "other"),
    [("adamw", "adamw-8bit"), ("adamw-offloaded", "adamw-8bit"), ("adamw-8bit", "adamw"), ("adamw-8bit", "adamw-offloaded")],
)
def test_what_another_optimizer_kept_is_not_taken_over(name, other):
    mine = parameters()
    optimizer, schedule, ids = build(mine, name)
    run(optimizer, schedule, mine, [4])
    saved = save_optimizer(optimizer, schedule, ids)
    optimizer, schedule, ids = build(mine, other)
    with pytest.raises(ValueError, match=r"^p0\.\w+ is missing"):
        load_optimizer(optimizer, schedule, ids, *saved)


@pytest.mark.parametrize("name", ON_CPU)
def test_moments_of_another_shape_are_refused(name):
    mine = parameters()
    optimizer, schedule, ids = build(mine, name)
    run(optimizer, schedule, mine, [4])
    tensors, values = save_optimizer(optimizer, schedule, ids)
    kind = "p4.state2" if name == "adamw-8bit" else "p4.exp_avg_sq"
    tensors[kind] = tensors[kind].reshape(64, 128)
    optimizer, schedule, ids = build(parameters(), name)
    with pytest.raises(ValueError, match=rf"^{kind} is \[64, 128\], not \[128, 64\]"):
        load_optimizer(optimizer, schedule, {id(p): f"p{i}" for i, p in enumerate(_all(optimizer))}, tensors, values)


def _all(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_state_that_leaves_and_comes_back_changes_no_bit(name):
    plain, mine = parameters(), parameters()
    run(*build(plain, name)[:2], plain, range(7))
    optimizer, schedule, names = build(mine, name)
    send_away(optimizer)  # there is none yet
    for step in range(7):
        bring_back(optimizer)
        assert not any(map(is_on_host, state_tensors(optimizer)))
        run(optimizer, schedule, mine, [step])
        here, _ = save_optimizer(optimizer, schedule, names)
        here = {kind: value.clone() for kind, value in here.items()}
        send_away(optimizer)
        send_away(optimizer)  # once is enough
        away, _ = save_optimizer(optimizer, schedule, names)
        assert here.keys() == away.keys()
        assert all(torch.equal(here[kind], away[kind]) for kind in here)
        tables = [t for t in state_tensors(optimizer) if not is_on_host(t)]
        assert sum(t.numel() * t.element_size() for t in tables) == (2048 if name == "adamw-8bit" else 0)
    assert_same(mine, plain)


def test_a_layout_by_hand():
    layout = Layout([torch.empty(3), torch.empty(2, 2, dtype=torch.bfloat16), torch.empty(5, dtype=torch.uint8)])
    assert [(place.first, place.bytes) for place in layout.places] == [(0, 12), (16, 8), (32, 5)]
    assert layout.bytes == 48 == 3 * ALIGNMENT
    run_of_bytes = torch.zeros(48, dtype=torch.uint8)
    first, second, third = layout.views(run_of_bytes)
    first.fill_(1.0), second.fill_(2.0), third.fill_(3)
    # 1.0 is 0x3f800000, 2.0 in bf16 is 0x4000; the lowest byte comes first
    assert run_of_bytes.tolist() == [0, 0, 128, 63] * 3 + [0] * 4 + [0, 64] * 4 + [0] * 8 + [3] * 5 + [0] * 11


def test_the_paged_kind_needs_cuda():
    with pytest.raises(ConfigError, match=r"^optimizer.name='paged-adamw-8bit' needs CUDA.*'cpu'; use 'adamw-8bit' or"):
        build(parameters(), "paged-adamw-8bit")


@pytest.mark.parametrize(
    ("found", "device", "message"),
    [
        (None, "cpu", r"needs bitsandbytes, which is not installed; pip install 'bitsandbytes>=0.50', or use 'adamw'"),
        ("0.49.2", "cpu", r"on a CPU needs bitsandbytes>=0.50, not 0.49.2; pip install"),
        ("0.48.0", "cuda", r"needs bitsandbytes>=0.49, not 0.48.0; pip install"),
        ("0.49.2", "cuda", None),
        ("0.50.0", "cpu", None),
    ],
)
def test_bitsandbytes_that_is_missing_or_old(found, device, message, monkeypatch):
    import importlib.metadata

    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.version", version)
    if message is None:
        eight_bit.check_available("adamw-8bit", device)
    else:
        with pytest.raises(ConfigError, match=rf"^optimizer.name='adamw-8bit' {message}"):
            eight_bit.check_available("adamw-8bit", device)
    eight_bit.check_available("adamw-offloaded", device)


@pytest.mark.parametrize("name", ["paged-adamw-8bit", "adamw-offloaded"])
def test_what_is_in_host_memory_cannot_leave(name):
    with pytest.raises(ConfigError, match=rf"^offload_in_rollout=True has nothing to do with name='{name}'.*; leave it false"):
        OptimizerSettings(name=name, offload_in_rollout=True)
