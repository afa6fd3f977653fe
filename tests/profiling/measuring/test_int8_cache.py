"""Memory of a rollout on a cache in int8: by hand, and simulated against measured."""

from __future__ import annotations

import pytest

from hydra_ppo.profiling.measuring.capture import capture
from tests.profiling.measuring.test_capture import AGREEMENT, assert_adds_up
from tests.profiling.models import CONFIGS, workload


@pytest.mark.parametrize(
    ("family", "prompt", "dtype"),
    [("llama", 24, "fp32"), ("llama", 60, "bf16"), ("llama", 100, "bf16"), ("gpt2", 40, "fp32"), ("gemma3", 60, "fp32")],
)
def test_simulated_and_measured_peaks_agree(family, prompt, dtype):
    """Past the modules and through them, of windows too; storage is made anew after 64 columns."""
    sizes = workload(kv_cache="int8", prompt=prompt, response=28, rollout_batch=6, score_batch=2, dtype=dtype)
    simulated = capture(sizes, simulate=True, config=CONFIGS[family])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS[family])
    assert simulated.phases.keys() == measured.phases.keys()
    for phase, peak in measured.phases.items():
        assert_adds_up(peak)
        if phase != "load" or not CONFIGS[family].tie_word_embeddings:
            assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated.phases["rollout"].kinds["kv cache"] == measured.phases["rollout"].kinds["kv cache"]


@pytest.mark.parametrize(("dtype", "scale"), [("fp32", 4), ("bf16", 2)])
def test_bytes_of_the_cache_by_hand(dtype, scale):
    """24 + 12 tokens of which the last is not fed: storage for 35 columns, which is all that will be needed."""
    sizes = workload(kv_cache="int8", rollout_batch=6, dtype=dtype)
    rows, columns, layers, heads, width = 6, 35, 4, 2, 32
    for simulate in (True, False):
        found = capture(sizes, simulate=simulate, device="cpu", config=CONFIGS["llama"]).phases["rollout"]
        assert found.kinds["kv cache"] == rows * columns * layers * 2 * (heads * width + heads * scale)
    exact = capture(workload(rollout_batch=6, dtype=dtype), simulate=True, config=CONFIGS["llama"]).phases["rollout"]
    assert exact.kinds["kv cache"] == rows * columns * layers * 2 * heads * width * scale
