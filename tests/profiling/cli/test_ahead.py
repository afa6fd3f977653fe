"""What is begun ahead comes out as if it had been called, and nothing of it outlives the block."""

from __future__ import annotations

import math
import os
import time
from functools import partial

import pytest

from hydra_ppo.profiling.cli.ahead import Ahead
from hydra_ppo.profiling.cli.plan import search
from tests.profiling.models import CONFIGS, workload


def test_one_worker_begins_nothing():
    with Ahead(os.getppid, 1) as ahead:  # would raise: it takes no argument
        ahead.begin([1, 2])
    with Ahead(math.factorial, 1) as ahead:
        assert ahead.result(5) == 120


def test_other_processes_give_the_same_and_end():
    with Ahead(partial(pow, 2), 2) as ahead:
        ahead.begin([3, 4, 3])
        assert [ahead.result(key) for key in (4, 3, 10)] == [16, 8, 1024]
        with pytest.raises(TypeError):
            ahead.result("text")
        workers = list(ahead._pool._processes.values())
        assert len(workers) == 2
    for process in workers:
        process.join(timeout=60)
        assert not process.is_alive()


def test_what_is_still_being_simulated_is_not_waited_for():
    with Ahead(time.sleep, 2) as ahead:
        ahead.begin([600, 601])
        workers = list(ahead._pool._processes.values())
        while not all(future.running() for future in ahead._begun.values()):
            time.sleep(0.05)
    for process in workers:
        process.join(timeout=60)
        assert not process.is_alive()


@pytest.mark.long
def test_plans_are_the_same(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    sizes = workload(model=str(tmp_path), dtype="bf16")
    for room in (8 * 2**20, 64 * 2**20):
        alone, together = (search(sizes, room, margin=0, workers=count) for count in (1, 2))
        assert alone == together
