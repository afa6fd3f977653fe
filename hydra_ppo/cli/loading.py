"""Loads what the commands need: tokenizer, model and rows, as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import DataSettings, ModelSettings
from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.data.rows import Loaded
    from hydra_ppo.model.heads import HeadPlan
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.model.roles import StageName


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies with the model.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(settings.name_or_path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.name_or_path={settings.name_or_path!r} gives no tokenizer: {reason}; "
            "put the tokenizer's files into the model folder."
        ) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> None:
    """Refuse a tokenizer that gives tokens which the model has no embedding for, before a weight is read.

    Raises:
        ConfigError: naming both sizes.
    """
    from transformers import AutoConfig

    from hydra_ppo.model.manifest import MANIFEST, base_folder

    folder = Path(settings.name_or_path)
    name = base_folder(folder) if (folder / MANIFEST).is_file() else settings.name_or_path
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError):
        return  # what loads the model says why
    rows = getattr(config.get_text_config(), "vocab_size", None)
    last = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and last >= rows:
        token = tokenizer.convert_ids_to_tokens(last)
        raise ConfigError(
            f"model.name_or_path={settings.name_or_path!r} has embeddings for {rows} tokens, "
            f"its tokenizer gives ids up to {last} ({token!r}); use the model's own tokenizer, or resize its embeddings."
        )


def load_model(settings: ModelSettings, train: StageName, heads: HeadPlan | None = None) -> HydraModel:
    """Load the shared base with the adapters that stage ``train`` needs, and ``heads``; None takes those of the saved model."""
    from hydra_ppo.model.hydra import HydraModel

    model = HydraModel.from_pretrained(
        settings.name_or_path,
        quantization=settings.quantization,
        quantize_embeddings=settings.quantize_embeddings,
        lora=settings.lora,
        attention=settings.attention,
        dtype=settings.dtype,
        trunk_layers=settings.trunk_layers,
        packing=settings.packing,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        train=train,
        check=settings.check,
        adapter=settings.adapter,
        tile_tokens=settings.tile_tokens,
        shard=settings.shard_base,
        heads=heads,
    )
    model.enable_checkpointing(settings.gradient_checkpointing, offload=settings.checkpoint_offload)
    return model


def load_rows(
    load: Callable[..., Loaded[Any]], tokenizer: PreTrainedTokenizerBase, data: DataSettings, seed: int
) -> tuple[list[Any], list[Any], list[str]]:
    """Load training and held-out rows; also return a line on every reason why rows were left out or cut."""
    from hydra_ppo.data.rows import prompt_key, repeats, shared_prompts, split_held_out

    train = load(data.train, tokenizer, data, split=data.split)
    notes = _notes("data.train", train)
    notes += [f"data.train: {count} of {len(train.rows)} rows: {what}" for what, count in repeats(train.rows).items()]
    if data.eval is None:
        rows, eval_rows = split_held_out(train.rows, data.eval_fraction, seed)
        prompts, held_out_prompts = len({prompt_key(row) for row in train.rows}), len({prompt_key(row) for row in eval_rows})
        if prompts < len(train.rows) and data.eval_fraction > 0:
            notes.append(
                f"held out: {len(eval_rows)} of {len(train.rows)} rows, with {held_out_prompts} of {prompts} prompts; "
                "rows of one prompt stay together"
            )
        return rows, eval_rows, notes
    held_out = load(data.eval, tokenizer, data, split=data.eval_split)
    notes += _notes("data.eval", held_out)
    if shared := shared_prompts(train.rows, held_out.rows):
        notes.append(f"data.eval: {shared} of {len(held_out.rows)} rows have a prompt that data.train has too")
    return train.rows, held_out.rows, notes


def _notes(setting: str, loaded: Loaded[Any]) -> list[str]:
    seen = len(loaded.rows) + loaded.skipped
    several = f"{setting}: {loaded.read} rows hold {seen} pairs: {len(loaded.rows)} are used"
    first = f"{setting}: {len(loaded.rows)} of {seen} rows are used" if loaded.read in (0, seen) else several
    what = "rows" if loaded.read in (0, seen) else "pairs"
    return [first] + [f"{setting}: {count} of {seen} {what}: {reason}" for reason, count in loaded.reasons.items()]
