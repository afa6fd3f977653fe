"""A stand-in for a vLLM server, and the model whose actor samples on it."""

from __future__ import annotations

import pytest

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.vllm import asking
from tests.families import randomise
from tests.hydra_ppo.rollout.standin import standing_in
from tests.training import write_model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), initializer_range=0.2)  # else hardly another than the uniform


@pytest.fixture(scope="session")
def held(base):
    with standing_in(base) as server:
        yield server


@pytest.fixture
def server(held, monkeypatch):
    """A server that nothing was asked yet, and no pauses between tries."""
    held.adapters.clear()
    held.asked.clear()
    held.faults.clear()
    held.changed, held.hung_up, held.raw, held.deaf = {}, 0, False, False
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 0.0)
    return held


@pytest.fixture(scope="session")
def model(base):
    found = HydraModel.from_pretrained(base, dtype="fp32", check="off")
    randomise(found)
    return found
