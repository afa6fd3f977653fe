"""Settings that hold for the whole suite."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, and of each of pytest's own
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line does, which may come later than the import
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # likewise
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and a name that is no folder fails at once

import pytest
import torch

from tests.long import is_long

# The models are tiny: a second thread costs more than it brings, and much more where another process wants the core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def models_of_one_make_are_tried_once():
    """Let the probe pass over a model whose make it found right in this process: the suite builds thousands of a dozen."""
    from hydra_ppo.model import hydra

    plain, right = hydra.probe, set()

    def once(model, check, quantised):
        make = repr(model.base), repr(model.causal_lm.config), model.trunk_layers, model.train_stage, check, quantised
        if make not in right:
            plain(model, check, quantised=quantised)
            right.add(make)

    hydra.probe = once
    yield
    hydra.probe = plain


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items):
    """Mark what is long."""
    for item in items:
        if is_long(item.nodeid):
            item.add_marker(pytest.mark.long)
