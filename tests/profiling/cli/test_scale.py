from __future__ import annotations

import pytest

from hydra_ppo.profiling.cli.predictor import Predictor
from hydra_ppo.profiling.cli.scale import PER_GPU, rows
from hydra_ppo.profiling.workload import Workload
from tests.profiling.models import CONFIGS


@pytest.mark.long
def test_what_is_sent_by_hand(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    workload = Workload(str(tmp_path), dtype="fp32", rank=4, prompt=12, response=12, update_order="in-turn")
    with Predictor(workload, lambda text: None, micros=(1,)) as predictor:
        alone, whole, part = rows(predictor, workload, ((1, False), (2, False), (2, True)))
    linear = 4 * predictor.linear
    assert (alone.gradients, alone.updates, alone.token) == (0, 0, 0)
    assert (
        whole.gradients == part.gradients == 2 * 4 * 4 * predictor.adapter
    )  # both adapters in fp32, once around and back, half
    assert (whole.updates, part.updates) == (0, linear // 2 * 4 * PER_GPU)
    assert part.token == linear // 2
    assert alone.base - part.base == linear // 2
    assert part.peak < whole.peak
