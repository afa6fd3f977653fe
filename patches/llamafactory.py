"""LLaMA-Factory's PPO, 0.9.3, over one base.

    PYTHONPATH=$(python -m hydra_ppo.patches.llamafactory) llamafactory-cli train ppo.yaml

ppo.yaml stays as it is, but for `reward_model: FOLDER`, a folder that `hydra-ppo sft` wrote on the very base that
`model_name_or_path` names (and `reward_model_type: full`). All four models of the run are roles of that folder's model, and
what is saved is such a folder too. Any other `reward_model` runs as if this patch were not there.

What the command prints goes on PYTHONPATH; its `sitecustomize` calls `bind`. In a process of one's own: `with apply(): ...`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra_ppo.model.manifest import MANIFEST
from hydra_ppo.patches.binding import Applied, Bindings, install
from hydra_ppo.patches.llamafactory_rules import WORKFLOW, check, say
from hydra_ppo.patches.versions import require

HOST = "llamafactory"
NAMED_IN = ("llamafactory.train.ppo", "llamafactory.train.tuner")
"""Modules that import `run_ppo` by its name; each holds one more reference to it."""


def apply() -> Applied:
    """Patch LLaMA-Factory in this process; used as a context manager, or by `undo()`, it is left as it was.

    Raises:
        HostError: for a version of LLaMA-Factory other than 0.9.3.
    """
    require(HOST, "0.9.3", "0.9.4")
    import_module(NAMED_IN[-1])
    bind(import_module(WORKFLOW))
    return Applied(HOST, {})


def bind(workflow: ModuleType) -> None:
    """Put `run_ppo` in place, in `workflow` and where it was imported to.

    Raises:
        HostError: for a version of LLaMA-Factory other than 0.9.3.
    """
    require(HOST, "0.9.3", "0.9.4")
    original = workflow.run_ppo
    owners = [workflow, *(sys.modules[name] for name in NAMED_IN if name in sys.modules)]
    patched = _run_ppo(original)

    def replace(bindings: Bindings) -> None:
        for owner in owners:
            if vars(owner).get("run_ppo") is original:
                bindings.set(owner, "run_ppo", patched)

    install(HOST, replace)


def _run_ppo(original: Any) -> Any:
    def run_ppo(
        model_args: Any,
        data_args: Any,
        training_args: Any,
        finetuning_args: Any,
        generating_args: Any,
        callbacks: Any = None,
    ) -> None:
        arguments = {
            "model": model_args,
            "data": data_args,
            "training": training_args,
            "finetuning": finetuning_args,
            "generating": generating_args,
        }
        folder = hydra_folder(finetuning_args.reward_model)
        if folder is None:
            say(f"hydra-ppo: reward_model={finetuning_args.reward_model} holds no {MANIFEST}, so nothing is changed.")
            original(**{f"{name}_args": value for name, value in arguments.items()}, callbacks=callbacks)
            return
        check(folder, **arguments)
        from hydra_ppo.patches.llamafactory_run import Run  # torch, only now

        with Run(folder):
            original(**{f"{name}_args": value for name, value in arguments.items()}, callbacks=callbacks)

    return run_ppo


def hydra_folder(reward_model: Any) -> Path | None:
    """Return the folder of a saved HydraModel that the setting names, None where it names something else."""
    folder = Path(str(reward_model))
    return folder if (folder / MANIFEST).is_file() else None


if __name__ == "__main__":
    print(Path(__file__).resolve().parent / "site")
