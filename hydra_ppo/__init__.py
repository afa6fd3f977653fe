"""PPO-based RLHF with actor, reference, critic and reward model on one shared base."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Names resolve on first use, so that `hydra-ppo --help` need not import torch.
_HOMES = {
    "HydraModel": "model.hydra",
    "JointSFTTrainer": "training.joint_sft",
    "PPOTrainer": "training.ppo",
    "PPOConfig": "config.settings",
    "SFTConfig": "config.settings",
    "HydraError": "errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hydra_ppo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hydra_ppo' has no attribute {name!r}")
