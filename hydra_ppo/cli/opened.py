"""Opens a finished run to sample and to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_ppo.cli.loading import check_vocabulary, load_tokenizer
from hydra_ppo.cli.saved import tokenizer_folder
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.model.hydra import HydraModel


@dataclass(frozen=True)
class Opened:
    """A saved model that is ready to sample and to score, and is not trained.

    Attributes:
        ends: tokens that end a response, the trained one first.
        pad_id: fills up rows.
        scores: whether its reward head says anything.
    """

    model: HydraModel
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    pad_id: int
    scores: bool


def open_tokenizer(run: Path, config: PPOConfig | SFTConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run.

    Raises:
        ConfigError: where it has none, or gives tokens that the model does not know.
    """
    folder = tokenizer_folder(run) or run
    tokenizer = load_tokenizer(replace(config.model, name_or_path=str(folder)))
    check_vocabulary(tokenizer, config.model)
    return tokenizer


def open_model(run: Path, config: PPOConfig | SFTConfig, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str]) -> Opened:
    """Load a run in the roles that are wanted, and in `reward` where its head was trained; `base` is the base by itself.

    Raises:
        ConfigError: where the run has no such role, or its answers end elsewhere than its reward head was trained at.
    """
    from hydra_ppo.model.answers import end_tokens, settle_ends
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.model.roles import Role, Stage

    manifest = read_manifest(run)
    known = {name: Role(**spec) for name, spec in manifest["roles"].items()} | {"base": Role(None, "lm")}
    scores = bool(manifest["reward_head_trained"]) and "reward" in known
    names = [*wanted, *(["reward"] if scores and "reward" not in wanted else [])]
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ConfigError(f"role={missing!r} is not in run={str(run)!r}; choose among {', '.join(known)}.")
    settings = config.model
    model = HydraModel.from_pretrained(
        run,
        quantization=settings.quantization,
        quantize_embeddings=settings.quantize_embeddings,
        attention=settings.attention,
        dtype=settings.dtype,
        packing=settings.packing,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        check=settings.check,
        tile_tokens=settings.tile_tokens,
        train=Stage("saved", {name: known[name] for name in names}, trained=()),
    )
    ends = end_tokens(model, tokenizer, config.data.end_of_turn)
    settle_ends(model, tokenizer, ends, reads_head=scores)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return Opened(model, tokenizer, ends, pad_id, scores)
