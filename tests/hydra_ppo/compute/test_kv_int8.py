"""The cache in int8: its numbers by hand, its bytes, and the operations of the exact cache on what is rounded."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hydra_ppo.compute import kv_cache, kv_int8
from hydra_ppo.compute.int8 import dequantise, quantise
from hydra_ppo.compute.kv_cache import ConcatenatingCache, KVCache, new_cache
from hydra_ppo.compute.kv_int8 import Int8Cache, Int8Tensor, cache_for, mixer
from hydra_ppo.errors import UnsupportedModelError

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
has_layers = pytest.mark.skipif(not isinstance(new_cache(1), KVCache), reason="caches of this transformers have no layers")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Values as they are held."""
    return dequantise(*quantise(x))


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Keys as they are held: rounded between the mixer and its inverse."""
    matrix, gain = mixer(x.shape[-1], CPU)
    return rounded(x @ matrix) @ matrix / gain


# -- rounding ------------------------------------------------------------------------------------------------------------


def test_codes_and_scales_by_hand():
    codes, scales = quantise(torch.tensor([[127.0, -64.4, 0.4, 2.6], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.5, 0.25, 0.0]]))
    # Scales 1 and 1 / 127; 0.5 and 0.25 of it are 63.5 and 31.75 steps, of which the first is rounded to the even one.
    assert codes.dtype is torch.int8
    assert codes.tolist() == [[127, -64, 0, 3], [0, 0, 0, 0], [-127, 64, 32, 0]]
    assert scales[[0, 2], 0].tolist() == [1.0, pytest.approx(1 / 127, rel=1e-6)]
    found = dequantise(codes, scales)
    assert found[:2].tolist() == [[127.0, -64.0, 0.0, 3.0], [0.0] * 4]
    assert found[2].tolist() == pytest.approx([-1.0, 64 / 127, 32 / 127, 0.0], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_nothing_is_off_by_more_than_half_a_scale(dtype, size):
    """Scales are rounded to 8 bits in bf16; what they are multiplied with was found with the rounded ones."""
    x = (torch.randn(50, 3, 7, 80, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    codes, scales = quantise(x)
    assert scales.dtype is dtype
    away = (x.double() - codes.double() * scales.double()).abs()
    assert (away <= scales.double() * (0.5 + 1e-4)).all()
    if dtype is torch.float16 and size < 1:  # 1e-3 / 127 is about the smallest scale
        assert (scales >= 2**-16).all()
        return
    assert codes.int().abs().amax(dim=-1).eq(127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(dtype, bad):
    x = torch.ones(2, 5, dtype=dtype)
    x[1, 3] = bad
    found = rounded(x)
    assert found[0].isfinite().all()
    assert not found[1, 3].isfinite()


@pytest.mark.parametrize(("size", "gain"), [(1, 1), (2, 2), (6, 2), (15, 1), (64, 64), (80, 16), (128, 128)])
def test_a_mixer_is_its_own_inverse_but_for_its_gain(size, gain):
    matrix, found = mixer(size, CPU)
    assert found == gain
    assert torch.equal(matrix @ matrix, gain * torch.eye(size))
    assert torch.equal(matrix, matrix.T)
    assert matrix.abs().sum(dim=0).eq(gain).all()


def test_mixing_by_hand():
    """For 6 = 2 x 3: entry i with entry i + 3."""
    found = mixer(6, CPU).mix(torch.tensor([1.0, 2, 3, 10, 20, 30]))
    assert found.tolist() == [11, 22, 33, -9, -18, -27]


def test_one_large_entry_in_all_keys_costs_the_others_nothing():
    """One of 64 entries is 50 times the others: without a mixer they would share 2 or 3 codes on either side."""
    keys = torch.randn(4, 2, 30, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 7] += 50
    plain, own = (rounded(keys) - keys)[..., 8:], (mixed(keys) - keys)[..., 8:]
    assert own.square().mean() < 0.1 * plain.square().mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_in_pieces_is_rounding(dtype, monkeypatch):
    columns = torch.randn(5, 2, 3, 8).to(dtype)
    found = []
    for piece in (2**22, 100, 1):
        monkeypatch.setattr(kv_int8, "PIECE", piece)
        held = Int8Tensor(limit=4)
        held.mixer = mixer(8, CPU)
        held.append(columns)
        found.append(held.filled)
        away = (held.whole().float() - columns.float()).abs().max()
        assert away < {torch.float32: 0.02, torch.bfloat16: 0.05, torch.float16: 0.02}[dtype]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert found[0][1].dtype is dtype


# -- the cache -----------------------------------------------------------------------------------------------------------


@has_layers
@pytest.mark.parametrize("columns", [64, 4, 3])
def test_the_cache_holds_the_rounded_of_what_transformers_own_holds(columns, monkeypatch):
    monkeypatch.setattr(kv_cache, "COLUMNS", columns)
    ours, plain = cache_for("int8", 17), DynamicCache()
    selections = {0: [0, 0, 1, 1, 1, 2], 4: [0, 5, 2, 3], 9: [3, 1, 2], 10: [0, 2], 11: [1, 1, 0], 14: [2]}
    rows = 3
    for step in range(15):
        width = 3 if step == 0 else 1
        for layer in range(2):
            keys, values = torch.randn(2, rows, 2, width, 4).unbind(0)
            values = values[..., :3]  # keys and values of different sizes
            found = ours.update(keys, values, layer)
            wanted = plain.update(mixed(keys), rounded(values), layer)
            for mine, theirs in zip(found, (keys, values) if step == 0 else wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
                assert step > 0 or torch.equal(mine, theirs)  # the prompt's own as they are
        assert ours.get_seq_length() == plain.get_seq_length() == 3 + step
        if (sources := selections.get(step)) is not None:
            ours.keep(sources, CPU)
            plain.batch_select_indices(torch.tensor(sources))
            rows = len(sources)


@has_layers
def test_columns_that_come_together_see_one_another_as_they_are():
    cache = Int8Cache(limit=9)
    first, more = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 3, 8)
    cache.update(first, first, 0)
    keys, values = cache.update(more, 2 * more, 0)
    assert torch.equal(keys[:, :, 4:], more)
    torch.testing.assert_close(keys[:, :, :4], mixed(first), rtol=1e-6, atol=1e-6)
    assert torch.equal(values, torch.cat([rounded(first), 2 * more], dim=2))
    keys, _ = cache.update(first[:, :, :1], first[:, :, :1], 0)
    torch.testing.assert_close(keys, mixed(torch.cat([first, more, first[:, :, :1]], dim=2)), rtol=1e-6, atol=1e-6)


@has_layers
def test_a_column_can_be_written_in_place():
    written, appended = Int8Cache(limit=9), Int8Cache(limit=9)
    prompt, entering = torch.randn(3, 2, 4, 8), torch.randn(2, 3, 2, 8)
    for cache in (written, appended):
        cache.update(prompt, -prompt, 0)
    written.extend(1)
    written.growing[0].write(*entering)
    keys, values = appended.update(entering[0, :, :, None], entering[1, :, :, None], 0)
    mine = [half.whole() for half in written.growing[0].held]
    assert torch.equal(mine[0], keys)
    assert torch.equal(mine[1], values)
    written.leap(2)
    assert written.get_seq_length() == 7
    assert torch.equal(written.growing[0].held[0].whole()[:, :, :5], keys)
    assert written.growing[0].held[0].whole()[:, :, 5:].eq(0).all()


@has_layers
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_bytes_by_hand(dtype, scale, monkeypatch):
    monkeypatch.setattr(kv_cache, "COLUMNS", 4)
    cache = Int8Cache(limit=10)
    rooms, places = [], []
    for width in (3, 1, 1, 1, 1, 1, 1, 1):
        columns = torch.randn(5, 2, width, 8).to(dtype)
        cache.update(columns, columns, 0)
        held = sum(part._storage.untyped_storage().nbytes() for part in cache.growing[0].parts)
        rooms.append(held / (5 * 2 * (2 * 8 + 2 * scale)))  # rows x (keys and values) x (heads x D + heads x a scale)
        places.append(cache.growing[0].parts[0].filled.data_ptr())
    assert rooms == [4, 4, 8, 8, 8, 8, 10, 10]
    assert len(set(places[2:6])) == 1
    cache.keep([0, 4, 2], CPU)
    assert cache.growing[0].parts[0].filled.data_ptr() == places[-1]
    assert [tuple(part.filled.shape) for part in cache.growing[0].parts] == [(3, 2, 10, 8), (3, 2, 10, 1)] * 2


@has_layers
def test_who_reads_keys_past_the_cache_finds_none():
    """Codes there would be taken for keys."""
    cache = Int8Cache(limit=4)
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    assert cache.growing[0].keys is None
    assert cache.growing[0].values is None


def test_a_transformers_without_layers_is_refused(monkeypatch):
    monkeypatch.setattr(kv_int8, "new_cache", ConcatenatingCache)
    with pytest.raises(UnsupportedModelError, match=r"^rollout.kv_cache='int8' needs caches that are made of layers.*use "):
        cache_for("int8", 4)
    assert isinstance(cache_for("auto", 4), ConcatenatingCache)
