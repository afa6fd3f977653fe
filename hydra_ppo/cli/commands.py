"""What the commands do, once their settings are parsed.

torch and transformers are imported inside the functions, so that ``--help`` and ``--dry-run`` need neither.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import DataSettings, ModelSettings, PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.contents import CONFIG
from hydra_ppo.runs.folder import check_output, is_starting, read_state
from hydra_ppo.runs.run import Run
from hydra_ppo.runtime.interruption import StopRequested, stopping_at_once, stopping_on_signals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.cli.choices import ExportedRole
    from hydra_ppo.data.rows import Loaded
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.model.roles import StageName
    from hydra_ppo.runs.checkpoint import Checkpoint
    from hydra_ppo.training.joint_sft import JointSFTTrainer
    from hydra_ppo.training.ppo import PPOTrainer


def sft(config: SFTConfig, resume: bool = False) -> Path:
    """Train the SFT model and the reward model jointly; return the run folder.

    Args:
        resume: go on with the run that the folder holds; begin where it holds none.

    Raises:
        StopRequested: on SIGTERM, SIGINT or SIGHUP, after a checkpoint was written.
    """
    folder = check_output(config.run, config, command="sft", resume=resume)
    with _stoppable(folder, "sft"):
        with stopping_at_once():
            from hydra_ppo.data.rows import ensure_pad_token, load_preferences
            from hydra_ppo.model.answers import end_tokens, settle_ends
            from hydra_ppo.training.joint_sft import JointSFTTrainer

            loaded = _load(config, load_preferences, config.stage, resume)
            if loaded is None:
                return folder
            # The trainer checks the settings against model and data, so it comes before the folder.
            trainer = JointSFTTrainer(
                loaded.model, config, loaded.rows, loaded.eval_rows, pad_token_id=ensure_pad_token(loaded.tokenizer)
            )
            ends = end_tokens(loaded.model, loaded.tokenizer, config.data.end_of_turn)
            settle_ends(loaded.model, loaded.tokenizer, ends, reads_head=False)
            loaded.bring(trainer, config)
        with _open(config, "sft", trainer, loaded) as run:
            # Called whenever the held-out loss is the best so far; a save at the end would undo that.
            trainer.save_best = lambda: _save(run, loaded.model)
            _finish(run, trainer.train())
    return folder


def ppo(config: PPOConfig, resume: bool = False) -> Path:
    """Train actor and critic with PPO; return the run folder. Arguments and errors as of `sft`."""
    folder = check_output(config.run, config, command="ppo", resume=resume)
    with _stoppable(folder, "ppo"), ExitStack() as at_the_end:
        with stopping_at_once():
            from hydra_ppo.cli.rollouts import Sampling
            from hydra_ppo.data.rows import load_prompts
            from hydra_ppo.rewards.scorer import check_source
            from hydra_ppo.training.ppo import PPOTrainer

            for source in config.reward.sources:
                check_source(source, config.reward.isolation)  # what is wrong with it is known before a weight is read
            loaded = _load(config, load_prompts, "ppo", resume)
            if loaded is None:
                return folder
            sampling = Sampling(loaded.notes.append)
            sampler = at_the_end.enter_context(sampling.sampler(config, loaded.model, loaded.rows))
            trainer = PPOTrainer(loaded.model, loaded.tokenizer, config, loaded.rows, loaded.eval_rows, sampler=sampler)
            loaded.bring(trainer, config)
        with _open(config, "ppo", trainer, loaded) as run:
            sampling.note = run.note
            summary = trainer.train()
            _save(run, loaded.model)
            _finish(run, summary)
    return folder


@dataclass
class _Loaded:
    """What a run is made of: rows, model, and the checkpoint that it goes on from."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[Any]
    eval_rows: list[Any]
    model: HydraModel
    checkpoint: Checkpoint | None
    identity: dict[str, Any]
    notes: list[str]
    resume: bool

    def bring(self, trainer: PPOTrainer | JointSFTTrainer, config: SFTConfig | PPOConfig) -> None:
        """Bring model and trainer to where the checkpoint was written; where it cannot be read, to the one before it.

        Raises:
            ConfigError: where none can be read.
        """
        from hydra_ppo.cli.resume import check_unchanged, find_checkpoint, why_unreadable

        like = trainer.state().values if self.checkpoint is not None else {}
        while (checkpoint := self.checkpoint) is not None:
            problem = why_unreadable(checkpoint, self.model, trainer, like)
            if problem is None:
                self.notes.append(f"goes on from {checkpoint.folder.name}")
                return
            folder = checkpoint.folder.parent.parent
            self.checkpoint = find_checkpoint(folder, self.notes.append, checkpoint.position, problem)
            if self.checkpoint is not None:
                check_unchanged(self.checkpoint, config, self.identity)


def _load(config: SFTConfig | PPOConfig, load: Callable[..., Loaded[Any]], stage: StageName, resume: bool) -> _Loaded | None:
    """Load what a run is made of; None where the run is finished, which is said."""
    from hydra_ppo.cli.model_check import check_lengths, what_to_know
    from hydra_ppo.cli.resume import check_unchanged, describe_run, find_checkpoint

    folder = Path(config.run.output).expanduser()
    notes: list[str] = []
    checkpoint = find_checkpoint(folder, notes.append) if resume and not is_starting(folder) else None
    # What chat templates say of today is what they said when the run began.
    begun = datetime.now() if checkpoint is None else datetime.fromisoformat(checkpoint.run["begun"])
    _seed(config.run.seed)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(tokenizer, config.model)
    rows, eval_rows, found = load_rows(partial(load, now=begun), tokenizer, config.data, config.run.seed)
    notes += found
    if checkpoint is not None:
        now = describe_run(config, tokenizer, rows, eval_rows)
        notes += check_unchanged(checkpoint, config, now)
        steps = config.steps if isinstance(config, PPOConfig) else now["optimizer_steps"]
        if checkpoint.position == (steps, 0) and (read_state(folder) or {}).get("state") == "finished":
            longer = "steps" if isinstance(config, PPOConfig) else "epochs or max_steps"
            print(f"{folder} is finished, with {steps} steps; raise {longer} to go on.")
            return None
    elif resume:
        notes.append(f"{folder} holds no checkpoint yet; the run starts at the first step")
    notes += what_to_know(config)
    if isinstance(config, PPOConfig):
        from hydra_ppo.rewards.scorer import check_columns

        check_columns(config.reward, [row.columns for row in rows])
    model = load_model(config.model, train=stage)
    notes += check_lengths(config, model.causal_lm)
    identity = describe_run(config, tokenizer, rows, eval_rows) | {"begun": begun.isoformat()}
    return _Loaded(tokenizer, rows, eval_rows, model, checkpoint, identity, notes, resume)


@contextmanager
def _open(config: SFTConfig | PPOConfig, command: str, trainer: PPOTrainer | JointSFTTrainer, loaded: _Loaded) -> Iterator[Run]:
    """Open the run folder and let the trainer write to it."""
    from hydra_ppo.data.tokenizer_files import save_tokenizer
    from hydra_ppo.runs.checkpoint import FOLDER, drop_leftovers, save_checkpoint

    done, _ = trainer.position
    with Run.create(config.run, config, command, resume=loaded.resume, done=done, sampled=trainer.sampled) as run:
        drop_leftovers(run.folder / FOLDER)
        for note in loaded.notes:
            run.note(note)
        with run.storing("tokenizer_config.json"):
            save_tokenizer(loaded.tokenizer, run.folder)

        def save(score: float | None) -> None:
            run.flush()
            save_checkpoint(
                run.folder,
                trainer.position,
                loaded.model.save_pretrained,
                trainer.state(),
                loaded.identity,
                score=score,
                keep_last=config.run.keep_last,
                keep_best=config.run.keep_best,
            )

        trainer.run, trainer.save = run, save
        yield run


def as_typed(path: Path) -> str:
    """Return a path as a shell and this program read it: quoted, and not like an option."""
    name = str(path)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


@contextmanager
def _stoppable(folder: Path, command: str) -> Iterator[None]:
    """Let SIGTERM, SIGINT and SIGHUP stop the run where nothing is lost, and say how to go on."""
    with stopping_on_signals():
        try:
            yield
        except StopRequested:
            known = folder / CONFIG
            again = f"hydra-ppo {command} {as_typed(known)} --resume" if known.exists() else "the same command"
            print(f"Stopped. Go on with: {again}", flush=True)
            raise


def export(run: Path, output: Path, role: ExportedRole, adapter_only: bool, dtype: str) -> None:
    """Write a role of a run as a plain Hugging Face model, or its adapter alone; print what a user should know."""
    from hydra_ppo.cli.export import export_role

    for note in export_role(run, output, role=role, adapter_only=adapter_only, dtype=dtype):
        print(note)


def inspect(folder: Path, as_json: bool) -> None:
    """Print what a run folder holds."""
    from hydra_ppo.runs.inspect import inspect_run, print_inspection

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


def load_model(settings: ModelSettings, train: StageName) -> HydraModel:
    """Load the shared base with the adapters and heads that stage ``train`` needs."""
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


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _save(run: Run, model: HydraModel) -> None:
    with run.storing("hydra.json"):
        _model_to(run.folder, model)


def _model_to(folder: Path, model: HydraModel) -> None:
    model.save_pretrained(folder)


def _finish(run: Run, summary: dict[str, Any]) -> None:
    """Draw the plots and close the run."""
    from hydra_ppo.runs.plots import plot_run

    with run.storing("plots"):
        plot_run(run.folder)
    run.finish(summary)
    print(f"Saved in {run.folder}; hydra-ppo inspect {as_typed(run.folder)} shows the numbers.")
