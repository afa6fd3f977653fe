"""Who samples in a run of ppo: this process, or vLLM servers, which are looked at before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import ModelSettings, PPOConfig
from hydra_ppo.model.manifest import MANIFEST, base_folder, read_manifest
from hydra_ppo.rollout.vllm.asking import Server
from hydra_ppo.rollout.vllm.launch import Launch, adapter_rank
from hydra_ppo.rollout.vllm.look import Needs, look
from hydra_ppo.runs.contents import VLLM
from hydra_ppo.runtime.interruption import check_stop

if TYPE_CHECKING:
    from hydra_ppo.data.rows import PromptRow
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.parallel.world import World
    from hydra_ppo.rollout.sampling import Samples

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What vLLM calls compute types."""


def check_servers(config: PPOConfig) -> list[tuple[str, str]]:
    """Look at the servers of a run, and return what they are, by setting; nothing where none samples.

    Raises:
        ConfigError: naming what is wrong, and the command that starts a server right.
    """
    if config.rollout.engine == "native":
        return []
    settings, needs = config.rollout.vllm, needs_of(config)
    found = []
    for url in settings.urls:
        check_stop()
        found.append(("rollout.vllm.urls", str(look(Server(url, settings.timeout, settings.retries), needs))))
    return found


def needs_of(config: PPOConfig) -> Needs:
    """Return what a run asks of a server, as far as its settings and the files of its model say."""
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    rank = adapter_rank(actor_options(config))
    base = base_of(config.model.name_or_path)
    launch = Launch(base, rank=rank, max_model_len=tokens, dtype=_dtype(config.model, base))
    return Needs(tokens, rank, config.rollout.vllm.model, launch)


def _dtype(settings: ModelSettings, base: str) -> str:
    """Return what the run computes in, as vLLM calls it: its own auto is another."""
    from hydra_ppo.model.loading import resolve_device

    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if resolve_device(settings.device).type == "cpu":
        return "float32"
    try:
        content = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
        return str(content.get("dtype") or content.get("torch_dtype") or "auto")
    except (OSError, ValueError, AttributeError):  # a name on the hub
        return "auto"


def base_of(name_or_path: str) -> str:
    """Return what a server is to load: the base of a run of this program, or the model itself; a folder by its whole path."""
    folder = Path(name_or_path).expanduser()
    name = base_folder(folder) if (folder / MANIFEST).is_file() else name_or_path
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def actor_options(config: PPOConfig) -> Mapping[str, Any]:
    """Return the PEFT options, as far as they are known, of the adapter that the actor will have.

    It is of the shape of the reference's, where that has one, else as the settings say.
    """
    folder = Path(config.model.name_or_path).expanduser()
    brought = None if config.model.adapter is None else Path(config.model.adapter)
    if (folder / MANIFEST).is_file():
        roles = read_manifest(folder)["roles"]
        name = (roles.get("actor") or roles.get("reference") or {}).get("adapter")
        brought = None if name is None else folder / name
    try:
        content = json.loads((brought / "adapter_config.json").read_text(encoding="utf-8")) if brought is not None else None
    except (OSError, ValueError):  # whoever loads it says what is wrong
        content = None
    if isinstance(content, dict) and isinstance(content.get("r"), int):
        return content
    lora = config.model.lora
    return {"r": lora.r, "target_parameters": lora.target_parameters}


class Sampling:
    """What samples in a run.

    Attributes:
        note: takes lines for the user; changes when the run's log is open.
        world: the processes of the run, of which rank 0 alone asks servers; None is this one.
    """

    def __init__(self, note: Callable[[str], None], world: World | None = None) -> None:
        self.note, self.world = note, world

    @contextmanager
    def sampler(self, config: PPOConfig, model: HydraModel, rows: Sequence[PromptRow]) -> Iterator[Callable[..., Samples]]:
        """Yield what PPOTrainer is to sample with; what a server was given is taken from it at the end.

        Raises:
            ConfigError: where a server is not what the run needs.
        """
        from hydra_ppo.rollout.sampling import sample

        if config.rollout.engine == "native":
            yield sample
            return
        from hydra_ppo.rollout.vllm.sampler import VLLMSampler

        folder = Path(config.run.output).expanduser()
        options: dict[str, Any] = {"run": folder, "note": lambda text: self.note(text)}
        options |= {} if self.world is None else {"world": self.world}
        with VLLMSampler(config.rollout, folder / VLLM, **options) as sampler:
            sampler.begin(model, [row.ids for row in rows], needs_of(config))
            yield sampler
