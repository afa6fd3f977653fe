"""PPO-based RLHF with actor, reference, critic and reward model on one shared base.

From outside: the names in `__all__`; everything else at the home that its room's docstring names.

Never: code, but for what must come before other libraries are imported. `errors` and `experience` beside this file, and the
maths in `algorithms`, are the vocabulary of every room.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` below finds, for type checkers
    from hydra_ppo.config.settings import PPOConfig as PPOConfig
    from hydra_ppo.config.settings import SFTConfig as SFTConfig
    from hydra_ppo.errors import HydraError as HydraError
    from hydra_ppo.model.hydra import HydraModel as HydraModel
    from hydra_ppo.training.joint_sft import JointSFTTrainer as JointSFTTrainer
    from hydra_ppo.training.ppo import PPOTrainer as PPOTrainer
    from hydra_ppo.views.views import role_views as role_views

__version__ = "0.1.0"

# bitsandbytes asks for a package of kernels as soon as it is imported on a processor with AVX512-BF16; all works without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())

# Names resolve on first use, so that `hydra-ppo --help` need not import torch.
_HOMES = {
    "HydraModel": "model.hydra",
    "JointSFTTrainer": "training.joint_sft",
    "PPOTrainer": "training.ppo",
    "PPOConfig": "config.settings",
    "SFTConfig": "config.settings",
    "HydraError": "errors",
    "role_views": "views.views",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hydra_ppo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hydra_ppo' has no attribute {name!r}")
