"""verl 0.9: actor, reference and critic on one base, as its engine `hydra`.

    python -m verl.trainer.main_ppo ... actor_rollout_ref.actor.strategy=hydra critic.strategy=hydra \\
        actor_rollout_ref.model.lora_rank=16 critic.model.path=BASE

Nothing is patched, and no line of Python is needed: verl imports this module itself, which the package names under the entry
point `verl.plugins`, and the engine is put into verl's registry as soon as that is there. All other strategies run as they did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hydra_ppo.patches.versions import HostError, host_version, require

HOST, LOWEST, BELOW = "verl", "0.9.1", "0.9.2"
REGISTRY = "verl.workers.engine"
BACKEND, DEVICES = "hydra", ["cuda", "cpu"]


def register() -> None:
    """Put the engine into verl's registry, unless it is there.

    For a version of verl that is not supported what is registered says so when it is asked for: verl passes over a plugin that
    raises while it is imported, without a word.
    """
    from verl.workers.engine.base import BaseEngine, EngineRegistry

    if BACKEND in EngineRegistry._engines.get("language_model", {}):
        return
    try:
        require(HOST, LOWEST, BELOW)
        from hydra_ppo.patches.verl_engine import HydraCritic, HydraEngine

        engines: tuple[type, type] = HydraEngine, HydraCritic
    except Exception as error:
        why = error if isinstance(error, HostError) else HostError(f"strategy=hydra: {type(error).__name__}: {error}")
        engines = _refusing(BaseEngine, why), _refusing(BaseEngine, why)
    for model_type, engine in zip(("language_model", "value_model"), engines, strict=True):
        EngineRegistry.register(model_type=model_type, backend=BACKEND, device=DEVICES)(engine)


def _refusing(base: Any, why: HostError) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise why

    return type("Refused", (base,), {"__init__": refuse})


class _Finder:
    """Finds verl's registry as the other finders would, and registers the engine once it has run.

    Importing it from here would load all of verl's engines into every process that imports verl.
    """

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the one module; None for all others."""
        if name != REGISTRY:
            return None
        sys.meta_path.remove(cls)
        spec = find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            loader.exec_module = _then_register(loader.exec_module)
        return spec


def _then_register(run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        run(module)
        register()

    return exec_module


def _on_import() -> None:
    if HOST not in sys.modules:  # which imports its plug-ins itself; this is somebody else
        host_version(HOST, f">={LOWEST},<{BELOW}")
    if REGISTRY in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder)


_on_import()
