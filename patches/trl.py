"""TRL's PPO trainers, 0.8 to 1.12.

    model = HydraModel.from_pretrained("runs/sft", quantization="nf4")
    trainer = PPOTrainer(args, tokenizer, **hydra_ppo.patches.trl.apply(model), train_dataset=dataset)
    trainer.train()

From 0.12 on the trainer takes four models and gets the four role views; before, the step-style trainer takes an actor with
a value head and a reference.
"""

from __future__ import annotations

from packaging.version import Version

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches.binding import Applied
from hydra_ppo.patches.versions import require

STEP_STYLE_ENDS = Version("0.12")


def apply(model: HydraModel) -> Applied:
    """Patch the installed TRL and return the models for its `PPOTrainer`, as keyword arguments.

    Args:
        model: at stage `ppo`.

    Returns:
        `model`, `ref_model`, `reward_model` and `value_model` (named as the installed version names them); for the step-style
        trainer `model` and `ref_model`. Used as a context manager, or by `undo()`, it leaves TRL as it was.

    Raises:
        HostError: for a version of TRL outside 0.8 to 1.12.
    """
    found = require("trl", "0.8", "1.13")
    if found < STEP_STYLE_ENDS:
        from hydra_ppo.patches import trl_step

        return trl_step.apply(model)
    from hydra_ppo.patches import trl_train

    return trl_train.apply(model)
