"""What `import hydra_ppo` does by itself."""

from __future__ import annotations

import logging


def test_a_notice_that_nobody_can_act_on_is_not_shown(caplog):
    """bitsandbytes says it where it is imported; what else it says is heard."""
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    caplog.set_level("WARNING", logger=noisy.name)  # the command line keeps all of it quiet
    noisy.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    noisy.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
