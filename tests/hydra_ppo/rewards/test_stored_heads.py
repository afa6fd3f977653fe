"""Heads on stored states: against modules of torch, and what training them rests on."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from hydra_ppo.config.rewards import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError, RewardError
from hydra_ppo.model.origin import Origin, check_origin
from hydra_ppo.rewards import head_training
from hydra_ppo.rewards.features import open_features
from hydra_ppo.rewards.head_training import HeadTraining, LabelledPairs, measure, split_by_prompt, train_heads
from hydra_ppo.rewards.one_pass import OnePass
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import Scorer
from hydra_ppo.rewards.stored_heads import StoredHeads, read_heads, write_heads
from tests.hydra_ppo.cli.reward_project import make_features

ORIGIN = Origin("b", "a", 2, 6, None, None, "float32")


def heads(members: int = 3) -> tuple[StoredHeads, list[nn.Module]]:
    """Heads 6 - 5 - 4 - 1 and the same as modules."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(members)]
    layers = tuple(
        (torch.stack([m[i].weight.data for m in modules]), torch.stack([m[i].bias.data for m in modules])) for i in (0, 2, 4)
    )
    center, scale, offset = torch.randn(6), torch.rand(6) + 0.5, torch.randn(members)
    return StoredHeads("mlp", layers, center, scale, offset, None, ORIGIN), modules


def test_members_are_those_modules():
    found, modules = heads()
    states = torch.randn(7, 6)
    scaled = (states - found.center) / found.scale
    expected = torch.cat([m(scaled) for m in modules], dim=1).detach() - found.offset
    assert torch.allclose(found.members(states), expected, atol=1e-6)


def test_written_and_read_they_are_the_same(tmp_path):
    found, _ = heads()
    write_heads(found, tmp_path)
    again = read_heads(tmp_path)
    states = torch.randn(5, 6)
    assert torch.equal(again.members(states), found.members(states))
    assert (again.kind, again.count, again.origin) == ("mlp", 3, ORIGIN)
    about = json.loads((tmp_path / "heads.json").read_text())
    for changed, message in (
        ({"kind": "linear"}, "holds no tensors of 3 heads of kind 'linear'"),
        ({"members": 4}, "holds no tensors of 4 heads"),
        ({"kind": "forest"}, "is not of this version"),
        ({"format": 2}, "is not of this version"),
        ({"origin": {"base": 1}}, "does not say what its states came of"),
    ):
        (tmp_path / "heads.json").write_text(json.dumps(about | changed))
        with pytest.raises(ConfigError, match=message):
            read_heads(tmp_path)


def test_a_source_of_two_kinds_of_numbers(tmp_path):
    """A spread is logged and is no part of the sum; a source that reads states is told where there are none."""
    found, _ = heads()
    write_heads(found, tmp_path)
    source = RewardSource("head", str(tmp_path), weight=2.0, aggregate="minimum")
    scorer = Scorer(RewardSettings(sources=[source, RewardSource(weight=0.5)]), torch.device("cpu"))
    assert scorer.needs_states
    assert scorer.needs_head
    states = torch.randn(2, 6)
    scores = scorer.score([10.0, 20.0], Responses.of_text(["p", "q"], ["a", "b"]), "here", states=states)
    low = found.members(states).min(dim=1).values
    assert scores.parts["head"] == pytest.approx(low.tolist())
    assert scores.parts["head/spread"] == pytest.approx(found.members(states).std(dim=1).tolist())
    assert scores.total == pytest.approx([2 * low[0].item() + 5.0, 2 * low[1].item() + 10.0])
    with pytest.raises(RewardError, match="reads states, and none were given"):
        scorer.score([10.0, 20.0], Responses.of_text(["p", "q"], ["a", "b"]), "here")


def test_each_origin_that_differs_is_named():
    now = {"base": "b", "adapter": "a", "end": 2, "hidden_size": 6, "quantization": None, "embeddings": None}
    now["dtype"] = "float32"
    for changed, message in (
        ({"base": "c"}, "another base"),
        ({"adapter": None}, "another reward adapter"),
        ({"hidden_size": 7}, "is for hidden size 6, the model has 7"),
        ({"end": 3}, "reads states at token 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_origin(ORIGIN, Origin(**(now | changed)), "heads='x'")
    assert check_origin(ORIGIN, Origin(**now), "x") is None
    assert check_origin(ORIGIN, Origin(**(now | {"base": None})), "x") is None  # of a base that is in no folder nobody knows
    note = check_origin(ORIGIN, Origin(**(now | {"quantization": "nf4", "dtype": "bfloat16"})), "heads='x'")
    assert note == (
        "heads='x': trained on states of a base in float32, read on one in nf4, bfloat16; scores differ by the rounding."
    )


def test_splitting_by_prompt():
    groups = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    train, held = split_by_prompt(groups, range(10), 0.2, seed=0)
    assert sorted([*train, *held]) == list(range(10))
    assert len(held) == 2
    assert groups[held[0]] == groups[held[1]]
    assert split_by_prompt(groups, range(10), 0.2, seed=0) == (train, held)
    assert {tuple(split_by_prompt(groups, range(10), 0.2, seed=s)[1]) for s in range(20)} != {tuple(held)}


def test_swapped_pairs_are_read_the_other_way_round():
    states = np.arange(24, dtype=np.float16).reshape(2, 2, 6)
    better, worse = LabelledPairs(states, np.array([False, True])).read([0, 1])
    assert better.tolist() == [states[0, 0].tolist(), states[1, 1].tolist()]
    assert worse.tolist() == [states[0, 1].tolist(), states[1, 0].tolist()]


def test_measured_by_hand():
    """The mean of the members decides; each has its own accuracy."""
    margins = torch.tensor([[3.0, -1.0], [-1.0, 0.5], [2.0, 2.0]])
    found = measure(margins)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracies"] == pytest.approx([2 / 3, 2 / 3])
    means = torch.tensor([1.0, -0.25, 2.0])
    assert found["loss"] == pytest.approx(nn.functional.softplus(-means).mean().item())


def test_early_stopping_keeps_the_best_of_each_member():
    """Labels that are noise: what is kept foretells held-out pairs no worse than knowing nothing."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(120, 2, 6)).astype(np.float16)
    training = HeadTraining("mlp", members=3, hidden=(32,), learning_rate=1e-2, batch_size=16)
    found = train_heads(LabelledPairs(states), range(80), range(80, 120), ORIGIN, training)
    assert found.measured["loss"] < 0.75  # log 2 is 0.693


def test_one_pass_is_one_pass(monkeypatch):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(700, 2, 6)).astype(np.float16)
    states[:, 0] += 0.5
    seen = []

    class Counting(OnePass):
        def update(self, z, y=1.0):
            seen.append(self)
            return super().update(z, y)

    monkeypatch.setattr(head_training, "OnePass", Counting)
    found = train_heads(LabelledPairs(states), range(600), range(600, 700), ORIGIN, HeadTraining("one-pass", members=1))
    counts = [seen.count(head) for head in dict.fromkeys(seen)]
    assert counts == [500] * 5 + [600]  # five ridges on the first 500, then all pairs once
    assert found.inverse is not None
    assert found.measured["accuracy"] > 0.7


def test_folders_of_others_are_looked_at_first(tmp_path):
    """A pipe is not waited for, a file that is cut or of another shape is one line."""
    found, _ = heads()
    write_heads(found, tmp_path / "heads")
    features = make_features(tmp_path / "features", 10)
    for folder, read in ((tmp_path / "heads", read_heads), (features, open_features)):
        os.mkfifo(folder / "pipe")
        with pytest.raises(ConfigError, match="holds 'pipe', which is neither file nor folder"):
            read(folder)
        (folder / "pipe").unlink()
        read(folder)
    whole = (features / "states.npy").read_bytes()
    for content, message in ((whole[:-8], "cannot be read"), (b"", "cannot be read"), (b"no array", "cannot be read")):
        (features / "states.npy").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            open_features(features)
    np.save(features / "states.npy", np.zeros((10, 2, 5), dtype=np.float16))
    with pytest.raises(ConfigError, match=r"states.npy is float16 \(10, 2, 5\), not float16 \(10, 2, 12\)"):
        open_features(features)
    (tmp_path / "heads" / "heads.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_heads(tmp_path / "heads")
