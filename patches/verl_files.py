"""Checkpoints of verl's engine `hydra`: what each role has trained, to the last bit, in files that others read.

Below the folder that verl names, `global_step_N/actor` or `global_step_N/critic`:

    hydra/                      the actor's: the whole model as `HydraModel.save_pretrained` writes it, tokenizer besides
    hydra_critic.safetensors    the critic's: its adapter and value head
    hydra_optimizer.safetensors optimizer, schedule, loss scale
    hydra_random_R_of_W.safetensors the random state of rank R of W
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_ppo.errors import CheckpointError
from hydra_ppo.model.adapters import adapter_parameters, read_adapter
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.runtime.files import PARTIAL

logger = logging.getLogger("hydra_ppo")

MODEL, CRITIC, OPTIMIZER = "hydra", "hydra_critic.safetensors", "hydra_optimizer.safetensors"


class Files:
    """Writes and reads the checkpoints of one role.

    Args:
        role: actor or critic.
        model: with that role.
        parts: optimizer, schedule and scaler by name; whatever has state_dict and load_state_dict.
        saved, loaded: which of model, optimizer and extra are written and read.
        tokenizer: saved beside the actor; None is none.
    """

    def __init__(
        self,
        role: str,
        model: HydraModel,
        parts: Mapping[str, Any],
        saved: Collection[str],
        loaded: Collection[str],
        tokenizer: Any,
    ) -> None:
        self.role, self.model, self.parts = role, model, parts
        self.saved, self.loaded, self.tokenizer = saved, loaded, tokenizer
        self.kept: list[Path] = []

    def save(self, folder: Path, random_state: Any, most: int | None) -> None:
        """Write a checkpoint, rank 0 what all ranks share, and remove the oldest above `most`.

        All ranks call it and leave it together.

        Raises:
            CheckpointError: on every rank, where one of them could not write.
        """
        trouble = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if dist.get_rank() == 0:
                self._write(folder)
            if "extra" in self.saved:
                _write_state(random_state, folder / _random_name())
        except (OSError, SafetensorError, TypeError) as error:
            trouble = f"{type(error).__name__}: {error}"
        _agree(trouble, f"checkpoint {str(folder)!r} could not be written", "the one before it is whole")
        self.kept.append(folder)
        while most and most > 0 and len(self.kept) > most:
            oldest = self.kept.pop(0)
            if dist.get_rank() == 0 and oldest != folder:
                shutil.rmtree(oldest, ignore_errors=True)

    def load(self, folder: Path) -> Any:
        """Bring the role to what `save` wrote; return the random state of this rank, None where none was written for it.

        Raises:
            CheckpointError: on every rank, where one of them could not read or the files are of another model.
        """
        trouble, state = None, None
        try:
            self._read(folder)
            if "extra" in self.loaded and (folder / _random_name()).is_file():
                state = _read_state(folder / _random_name())
            elif "extra" in self.loaded:
                logger.warning("%s was written by another number of processes: random states are not restored", folder)
        except Exception as error:  # of all that has a load_state_dict
            trouble = f"{type(error).__name__}: {error}"
        _agree(trouble, f"checkpoint {str(folder)!r} could not be read", "name another one as trainer.resume_from_path")
        return state

    def _write(self, folder: Path) -> None:
        if "model" in self.saved and self.role == "actor":
            self.model.save_pretrained(folder / MODEL)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder / MODEL)
        elif "model" in self.saved:
            tensors = {name: p.detach().contiguous() for name, p in self.model.role_parameters(self.role).items()}
            save_file(tensors, folder / (CRITIC + PARTIAL), {"format": "pt"})
            (folder / (CRITIC + PARTIAL)).replace(folder / CRITIC)
        if "optimizer" in self.saved:
            _write_state({name: part.state_dict() for name, part in self.parts.items()}, folder / OPTIMIZER)

    def _read(self, folder: Path) -> None:
        if "model" in self.loaded and self.role == "actor":
            read_adapter(self.model.base, "actor", folder / MODEL / "actor")  # type: ignore[arg-type]  # it has adapters
        elif "model" in self.loaded:
            _copy(load_file(folder / CRITIC), self.model.role_parameters(self.role))
        if "optimizer" in self.loaded:
            states = _read_state(folder / OPTIMIZER)
            for name, part in self.parts.items():
                part.load_state_dict(states[name])


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(f"{CRITIC} is of another model or of adapters of another shape")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _random_name() -> str:
    return f"hydra_random_{dist.get_rank()}_of_{dist.get_world_size()}.safetensors"


def _write_state(state: Any, path: Path) -> None:
    """Write what `state_dict` returned as safetensors, all but its tensors as JSON in the header: no pickle is ever opened."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, tensors))
    partial = path.with_name(path.name + PARTIAL)
    save_file(tensors, partial, {"tree": tree})
    partial.replace(path)


def _read_state(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return _unpack(json.loads(file.metadata()["tree"]), file.get_tensor)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON can hold it, and put its tensors aside. Keys keep their types, tuples stay tuples."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, Mapping):
        return {"pairs": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        kind = "tensor" if isinstance(value, Tensor) else "array"
        tensors[name] = (value.detach() if isinstance(value, Tensor) else torch.from_numpy(value)).contiguous()
        return {kind: name}
    raise TypeError(f"a state holds {type(value).__name__}, which is not written")


def _unpack(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, found),) = value.items()
    if kind == "pairs":
        return {_unpack(key, tensor): _unpack(item, tensor) for key, item in found}
    if kind == "tuple":
        return tuple(_unpack(item, tensor) for item in found)
    return tensor(found) if kind == "tensor" else tensor(found).numpy()


def _agree(trouble: str | None, what: str, remedy: str) -> None:
    """Wait for all ranks, and raise on each where one is in trouble."""
    troubles: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(troubles, trouble)
    for rank, found in enumerate(troubles):
        if found is not None:
            raise CheckpointError(f"{what} by rank {rank} ({found}); {remedy}.")


def adapter_tensors(model: HydraModel) -> dict[str, Tensor]:
    """Return the actor's adapter under PEFT's names, without gradients; no copies."""
    return {name.replace(".{}.", "."): p.detach() for name, p in adapter_parameters(model.base, "actor").items()}
