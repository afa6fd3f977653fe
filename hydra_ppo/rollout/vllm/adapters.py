"""Versions of adapters on servers: each in a folder and under a name of its own, loaded before the one before it goes.

A loaded name is never loaded again in place: the server would read the folder anew for every request, and blocks of its
prefix cache go by name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hydra_ppo.errors import ServerError, StorageError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.saving import adapter_tensors, write_adapter
from hydra_ppo.rollout.vllm.asking import AGAIN, GivenUp, Refused, Server, Waiting, together
from hydra_ppo.rollout.vllm.look import LOAD, UNLOAD, Seen

LOADING = AGAIN - {500}
"""A server answers 500 where it cannot take an adapter, and will not another time either."""
PREFIX = "hydra-"
"""Begins the names of all adapters that are loaded by this program."""
CLOSING = 5.0
"""Seconds for a server to take leave of the adapters at the end."""


@dataclass
class _Versions:
    """What is known of one adapter: digest of the version in force, names that servers have, folders that are there."""

    digest: str = ""
    names: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


class Adapters:
    """The adapters of one process on its servers.

    Args:
        servers: all of them, each with what was seen there.
        folder: where they are written.
        run: tells runs apart that share servers or folder; the same whenever a run goes on in the same place.
        alone: whether the folder is this run's alone, so that all that lies in it was left by processes that are dead.

    Memory: a copy of one adapter on the host, in the base's type.
    """

    def __init__(self, servers: Sequence[Server], seen: Sequence[Seen], folder: Path, run: str, *, alone: bool = False) -> None:
        self.servers, self.seen, self.folder, self.alone = list(servers), list(seen), folder, alone
        self.ours = f"{PREFIX}{run}-"
        self.process = os.urandom(4).hex()  # not of a seeded source: a run that goes on must find other names
        self.count = 0
        self._made_room = False
        self._known: dict[str, _Versions] = {}

    def names(self, model: HydraModel, role: str) -> list[str]:
        """Return what each server calls a role of the model as it is now, and see to it that it has it.

        Raises:
            ServerError: where a server does not take the adapter.
        """
        adapter = model.roles[role].adapter
        if adapter is None:
            return [seen.base for seen in self.seen]
        tensors = {
            name: tensor.detach().to("cpu", model.causal_lm.dtype) for name, tensor in adapter_tensors(model, adapter).items()
        }
        known, digest = self._known.setdefault(adapter, _Versions()), _digest(tensors)
        if digest != known.digest:
            self._replace(model, adapter, known, tensors)
            known.digest = digest
        return [known.names[-1]] * len(self.servers)

    def _replace(self, model: HydraModel, adapter: str, known: _Versions, tensors: Mapping[str, Tensor]) -> None:
        """Load a new version on all servers, then unload the one before; its folder stays one version longer."""
        self._make_room()
        self.count += 1
        name = f"{self.ours}{self.process}-{adapter}-v{self.count}"
        known.folders.append(self.folder / name)
        try:
            write_adapter(model, adapter, known.folders[-1], tensors)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise StorageError(
                f"{known.folders[-1]} cannot be written ({reason}); make room, or name another folder in "
                "rollout.vllm.adapter_folder, then go on with --resume."
            ) from error
        known.names.append(name)
        together([partial(self._load, server, name) for server in self.servers], len(self.servers))
        self._unload({server.url: known.names[:-1] for server in self.servers})
        del known.names[:-1]
        for old in known.folders[:-2]:
            shutil.rmtree(old, ignore_errors=True)
        del known.folders[:-2]

    def _make_room(self) -> None:
        """Make the folder; take away, once, what processes of this run left that were killed."""
        if self._made_room:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(
                f"rollout.vllm.adapter_folder={str(self.folder)!r} cannot be made ({error.strerror}); choose another folder."
            ) from None
        self._unload({seen.url: [name for name, root in seen.adapters.items() if self._left(name, root)] for seen in self.seen})
        for folder in self.folder.glob(f"{PREFIX if self.alone else self.ours}*"):
            shutil.rmtree(folder, ignore_errors=True)
        self._made_room = True

    def _left(self, name: str, root: str) -> bool:
        """Say whether a loaded adapter is one that a dead process of this run left, which may have run on another machine."""
        in_ours = self.alone and name.startswith(PREFIX) and Path(root).parent == self.folder.resolve()
        return name.startswith(self.ours) or in_ours

    def load_again(self, waiting: Waiting, server: Server, name: str) -> None:
        """Load the version in force on a server that does not know it, for it was started anew."""
        if not any(name in known.names[-1:] for known in self._known.values()):
            raise ServerError(f"vLLM server {server.url} does not know {name!r}, which is no version in force.")
        self._load(server, name, waiting)

    def _load(self, server: Server, name: str, waiting: Waiting) -> None:
        folder = (self.folder / name).resolve()
        try:
            server.ask(waiting, LOAD, {"lora_name": name, "lora_path": str(folder)}, again=LOADING)
        except Refused as error:
            if "already been loaded" in error.text:
                return  # by a request whose answer did not arrive, or by another thread
            raise ServerError(
                f"vLLM server {server.url} does not take the adapter in {str(folder)!r} (it answered {error}); where it "
                "does not see that folder, name one in rollout.vllm.adapter_folder that it sees too."
            ) from None

    def _unload(self, names: Mapping[str, Sequence[str]], *, stoppable: bool = True) -> None:
        """Unload adapters by the address of their server; a server that does not know one, or is gone, is none of our worry."""
        todo = [(server, name) for server in self.servers for name in names.get(server.url, ())]

        def unload(server: Server, name: str, waiting: Waiting) -> None:
            with suppress(Refused, ServerError):
                Server(server.url, CLOSING, 0).ask(waiting, UNLOAD, {"lora_name": name})

        if todo:
            together([partial(unload, server, name) for server, name in todo], len(todo), stoppable=stoppable)

    def close(self) -> None:
        """Unload what is loaded and remove its folders; says nothing of what fails."""
        named = [name for known in self._known.values() for name in known.names]
        with suppress(Exception, GivenUp):
            self._unload({server.url: named for server in self.servers}, stoppable=False)
        for known in self._known.values():
            for folder in known.folders:
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()  # where nothing of anybody else's is in it
        self._known.clear()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
