"""What the commands do, once their settings are parsed.

torch and transformers are imported inside the functions, so that ``--help`` and ``--dry-run`` need neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.config import DataSettings, ModelSettings, PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.run import Run, check_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.data import Loaded
    from hydra_ppo.model import HydraModel


def sft(config: SFTConfig) -> Path:
    """Train the SFT model and the reward model jointly; return the run folder."""
    check_output(config.run, config)
    from hydra_ppo.data import ensure_pad_token, load_preferences
    from hydra_ppo.joint_sft import JointSFTTrainer

    _seed(config.run.seed)
    tokenizer = load_tokenizer(config.model)
    pad_token_id = ensure_pad_token(tokenizer)
    train_rows, eval_rows, notes = load_rows(load_preferences, tokenizer, config.data, config.run.seed)
    stage = "base" if config.method == "full" else config.adapter
    model = load_model(config.model, train=stage)
    # The trainer checks the settings against model and data, so it comes before the folder.
    trainer = JointSFTTrainer(model, config, train_rows, eval_rows, pad_token_id=pad_token_id)
    with Run.create(config.run, config, "sft") as run:
        for note in notes:
            run.note(note)
        tokenizer.save_pretrained(run.folder)
        trainer.run = run
        # Called whenever the held-out loss is the best so far; a save at the end would undo that.
        trainer.save = lambda: model.save_pretrained(run.folder)
        _finish(run, trainer.train())
    return run.folder


def ppo(config: PPOConfig) -> Path:
    """Train actor and critic with PPO; return the run folder."""
    check_output(config.run, config)
    from hydra_ppo.checkpoint import save_checkpoint
    from hydra_ppo.data import ensure_pad_token, load_prompts
    from hydra_ppo.ppo import PPOTrainer

    _seed(config.run.seed)
    tokenizer = load_tokenizer(config.model)
    ensure_pad_token(tokenizer)
    prompts, eval_prompts, notes = load_rows(load_prompts, tokenizer, config.data, config.run.seed)
    model = load_model(config.model, train="ppo")
    trainer = PPOTrainer(model, tokenizer, config, prompts, eval_prompts)
    with Run.create(config.run, config, "ppo") as run:
        for note in notes:
            run.note(note)
        tokenizer.save_pretrained(run.folder)
        trainer.run = run
        trainer.save = lambda step: save_checkpoint(run.folder, step, model, config.run.keep_last)
        summary = trainer.train()
        model.save_pretrained(run.folder)
        _finish(run, summary)
    return run.folder


def export(run: Path, output: Path, adapter_only: bool) -> None:
    """Write the actor of a run as a plain Hugging Face model, or its adapter alone."""
    from hydra_ppo.export import export_actor

    export_actor(run, output, adapter_only=adapter_only)


def inspect(folder: Path, as_json: bool) -> None:
    """Print what a run folder holds."""
    from hydra_ppo.inspect_run import inspect_run, print_inspection

    report = inspect_run(folder)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_inspection(report)


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


def load_model(settings: ModelSettings, train: str) -> HydraModel:
    """Load the shared base with the adapters and heads that stage ``train`` needs."""
    from hydra_ppo.model import HydraModel

    model = HydraModel.from_pretrained(
        settings.name_or_path,
        quantization=settings.quantization,
        lora=settings.lora,
        attention=settings.attention,
        dtype=settings.dtype,
        trunk_layers=settings.trunk_layers,
        packing=settings.packing,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        train=train,
    )
    model.enable_checkpointing(settings.gradient_checkpointing)
    return model


def load_rows(
    load: Callable[..., Loaded], tokenizer: PreTrainedTokenizerBase, data: DataSettings, seed: int
) -> tuple[list[Any], list[Any], list[str]]:
    """Load training and held-out rows; also return a line on every reason why rows were left out or cut."""
    from hydra_ppo.data import split_held_out

    train = load(data.train, tokenizer, data, split=data.split)
    notes = _notes("data.train", train)
    if data.eval is None:
        return *split_held_out(train.rows, data.eval_fraction, seed), notes
    held_out = load(data.eval, tokenizer, data, split=data.eval_split)
    return train.rows, held_out.rows, notes + _notes("data.eval", held_out)


def _notes(setting: str, loaded: Loaded) -> list[str]:
    seen = len(loaded.rows) + loaded.skipped
    return [f"{setting}: {len(loaded.rows)} of {seen} rows are used"] + [
        f"{setting}: {count} of {seen} rows: {reason}" for reason, count in loaded.reasons.items()
    ]


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _finish(run: Run, summary: dict[str, Any]) -> None:
    """Draw the plots and close the run."""
    from hydra_ppo.plots import plot_run

    plot_run(run.folder)
    run.finish(summary)
    print(f"Saved in {run.folder}; hydra-ppo inspect {run.folder} shows the numbers.")
