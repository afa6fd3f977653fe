"""What the commands do, once their settings are parsed.

torch and transformers are imported inside the functions, so that ``--help`` and ``--dry-run`` need neither.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra_ppo.cli.loading import check_vocabulary, load_model, load_rows, load_tokenizer
from hydra_ppo.cli.practice import load_practice
from hydra_ppo.config.settings import PPOConfig, RunSettings, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.parallel.environment import place
from hydra_ppo.runs.contents import CONFIG
from hydra_ppo.runs.folder import check_output, is_starting, read_state
from hydra_ppo.runs.run import Run
from hydra_ppo.runtime.interruption import StopRequested, stopping_after, stopping_at_once, stopping_on_signals
from hydra_ppo.runtime.output import as_typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_ppo.cli.choices import ExportedRole
    from hydra_ppo.data.rows import Loaded
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.model.roles import StageName
    from hydra_ppo.parallel.world import World
    from hydra_ppo.runs.checkpoint import Checkpoint
    from hydra_ppo.training.joint_sft import JointSFTTrainer
    from hydra_ppo.training.ppo import PPOTrainer

Trainer = TypeVar("Trainer", bound="PPOTrainer | JointSFTTrainer")
Prepare = Callable[["World", ExitStack], "tuple[_Loaded, Trainer] | None"]
"""Loads what a run is made of and builds its trainer; what is to be closed at the end goes on the stack."""


def sft(config: SFTConfig, resume: bool = False) -> Path:
    """Train the SFT model and the reward model jointly; return the run folder.

    Args:
        resume: go on with the run that the folder holds; begin where it holds none.

    Raises:
        StopRequested: on SIGTERM, SIGINT or SIGHUP, after a checkpoint was written.
    """
    folder = check_output(config.run, config, command="sft", resume=resume)

    def prepare(world: World, at_the_end: ExitStack) -> tuple[_Loaded, JointSFTTrainer] | None:
        from hydra_ppo.data.rows import ensure_pad_token, load_preferences
        from hydra_ppo.model.answers import end_tokens, settle_ends
        from hydra_ppo.training.joint_sft import JointSFTTrainer

        load = partial(load_preferences, margins=config.reward_loss == "margin")
        loaded = _load(config, load, config.stage, resume)
        if loaded is None:
            return None
        # The trainer checks the settings against model and data, so it comes before the folder.
        pad = ensure_pad_token(loaded.tokenizer)
        trainer = JointSFTTrainer(loaded.model, config, loaded.rows, loaded.eval_rows, pad_token_id=pad, world=world)
        ends = end_tokens(loaded.model, loaded.tokenizer, config.data.end_of_turn)
        settle_ends(loaded.model, loaded.tokenizer, ends, reads_head=False)
        return loaded, trainer

    with _prepared(config, "sft", folder, prepare) as found:
        if found is not None:
            run, loaded, trainer = found
            # Called whenever the held-out loss is the best so far; a save at the end would undo that.
            trainer.save_best = lambda: _save(run, loaded.model)
            _finish(run, trainer.train())
    return folder


def ppo(config: PPOConfig, resume: bool = False) -> Path:
    """Train actor and critic with PPO; return the run folder. Arguments and errors as of `sft`."""
    folder = check_output(config.run, config, command="ppo", resume=resume)

    def prepare(world: World, at_the_end: ExitStack) -> tuple[_Loaded, PPOTrainer] | None:
        from hydra_ppo.cli.rollouts import Sampling
        from hydra_ppo.data.rows import load_prompts
        from hydra_ppo.rewards.scorer import check_source
        from hydra_ppo.training.ppo import PPOTrainer

        for _, source in config.named_sources() if world.is_main else []:
            check_source(source, config.reward.isolation)  # what is wrong with it is known before a weight is read
        loaded = _load(config, load_prompts, config.stage, resume)
        if loaded is None:
            return None
        practice, found = load_practice(config, loaded.tokenizer, datetime.fromisoformat(loaded.identity["begun"]))
        loaded.notes += found
        sampling = Sampling(loaded.notes.append, world)
        sampler = at_the_end.enter_context(sampling.sampler(config, loaded.model, loaded.rows))
        trainer = PPOTrainer(
            loaded.model,
            loaded.tokenizer,
            config,
            loaded.rows,
            loaded.eval_rows,
            sampler=sampler,
            world=world,
            ptx=practice.get("ptx", ()),
            rehearsal=practice.get("rehearsal", ()),
        )
        loaded.when_open = lambda run: setattr(sampling, "note", run.note)
        return loaded, trainer

    with _prepared(config, "ppo", folder, prepare) as found:
        if found is not None:
            run, loaded, trainer = found
            summary = trainer.train()
            if run is not None and trainer.stopped_by is not None:
                run.note(f"step {summary['steps']} of {trainer.steps}: stopped by alarm {trainer.stopped_by}; --resume goes on")
            _save(run, loaded.model)
            _finish(run, summary)
    return folder


@contextmanager
def _prepared(
    config: SFTConfig | PPOConfig, command: str, folder: Path, prepare: Prepare[Trainer]
) -> Iterator[tuple[Run | None, _Loaded, Trainer] | None]:
    """Meet the other processes, load what the run is made of, bring it to its checkpoint and open the folder.

    Yields:
        None where the run is finished; no `Run` in processes that do not write.
    """
    with _stoppable(folder, command, config.run):
        with stopping_at_once() if place().size == 1 else nullcontext():
            from hydra_ppo.parallel.joining import join

            if place().local_size > 1 and config.model.device.startswith("cuda:"):
                raise ConfigError(
                    f"model.device={config.model.device!r} puts {place().local_size} processes on one GPU; use auto, which "
                    "gives each its own."
                )
            world = join(config.run.rank_timeout)
            world.in_step = config.model.shard_base and world.size > 1  # a model that is tried when it is built makes passes
        with world.session(), ExitStack() as at_the_end:
            found = world.together(partial(_bring, config, prepare, world, at_the_end), "loading")
            if found is None:
                yield None
                return
            loaded, trainer = found
            where = "the checkpoint that the run goes on from"
            world.check_same(where, trainer.position, "put run.output where all processes see the same files", "position")
            world.copy_from_main(parameter for parameter in loaded.model.parameters() if parameter.requires_grad)
            with _open(config, command, trainer, loaded, world.is_main) as run:
                yield run, loaded, trainer


def _bring(
    config: SFTConfig | PPOConfig, prepare: Prepare[Trainer], world: World, at_the_end: ExitStack
) -> tuple[_Loaded, Trainer] | None:
    with stopping_at_once():
        found = prepare(world, at_the_end)
        if found is not None:
            loaded, trainer = found
            loaded.bring(trainer, config)
        return found


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
    when_open: Callable[[Run], None] = lambda run: None

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
    from hydra_ppo.model.heads import head_plan

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
        steps = now["steps"]
        if checkpoint.position == (steps, 0) and (read_state(folder) or {}).get("state") == "finished":
            longer = "steps or epochs" if isinstance(config, PPOConfig) else "epochs or max_steps"
            if place().is_main:
                print(f"{folder} is finished, with {steps} steps; raise {longer} to go on.")
            return None
    elif resume:
        notes.append(f"{folder} holds no checkpoint yet; the run starts at the first step")
    notes += what_to_know(config)
    if isinstance(config, PPOConfig):
        from hydra_ppo.rewards.scorer import check_columns

        check_columns(config.reward, [row.columns for row in rows])
        if (judges := config.evaluators) is not None:
            check_columns(judges, [row.columns for row in eval_rows])
    elif config.has_floor:
        from hydra_ppo.data.floor import FloorPairs

        # What cannot be made of the rows is known before a weight is read.
        FloorPairs(rows, config.floor_kinds, config.run.seed)
    model = load_model(config.model, train=stage, heads=head_plan(config))
    notes += check_lengths(config, model.causal_lm)
    identity = describe_run(config, tokenizer, rows, eval_rows) | {"begun": begun.isoformat()}
    return _Loaded(tokenizer, rows, eval_rows, model, checkpoint, identity, notes, resume)


@contextmanager
def _open(
    config: SFTConfig | PPOConfig, command: str, trainer: PPOTrainer | JointSFTTrainer, loaded: _Loaded, writes: bool
) -> Iterator[Run | None]:
    """Open the run folder and let the trainer write to it, where this process does."""
    if not writes:
        yield None
        return
    from hydra_ppo.data.tokenizer_files import save_tokenizer
    from hydra_ppo.runs.checkpoint import FOLDER, drop_leftovers, save_checkpoint

    done, _ = trainer.position
    opened = Run.create(config.run, config, command, resume=loaded.resume, done=done, sampled=trainer.sampled)
    with _with_page(opened.folder), opened as run:
        if (device := loaded.model.device).type == "cuda":
            import torch

            card = torch.cuda.get_device_properties(device)
            run.on_device(card.name, card.total_memory)
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
        loaded.when_open(run)
        yield run


@contextmanager
def _with_page(folder: Path) -> Iterator[None]:
    """Write the page of a run once it has ended, however it did; of one that failed in silence, why it did matters more."""
    from hydra_ppo.report.page import report_at_end

    ended = False
    try:
        yield
        ended = True
    finally:
        line = report_at_end(folder)
        if ended:
            print(line, flush=True)


@contextmanager
def _stoppable(folder: Path, command: str, run: RunSettings) -> Iterator[None]:
    """Let SIGTERM, SIGINT, SIGHUP and `run.max_time` stop the run where nothing is lost, and say how to go on.

    Raises:
        ConfigError: where there is a limit of time, and this is not the main thread.
    """
    if run.max_time is not None and threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            f"run.max_time={run.max_time!r} needs the main thread of the process; train there, or set it to null."
        )
    with stopping_on_signals():
        try:
            with stopping_after(run.most_seconds if place().is_main else None):  # one that stops stops all
                yield
        except StopRequested:
            known = folder / CONFIG
            again = f"hydra-ppo {command} {as_typed(known)} --resume" if known.exists() else "the same command"
            if place().size > 1:
                again = "the same command, with --resume" if known.exists() else again  # whoever started it
            if place().is_main:
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


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _save(run: Run | None, model: HydraModel) -> None:
    if run is not None:
        with run.storing("hydra.json"):
            _model_to(run.folder, model)


def _model_to(folder: Path, model: HydraModel) -> None:
    model.save_pretrained(folder)


def _finish(run: Run | None, summary: dict[str, Any]) -> None:
    """Draw the plots and close the run."""
    if run is None:
        return
    from hydra_ppo.runs.plots import plot_run

    with run.storing("plots"):
        plot_run(run.folder)
    run.finish(summary)
    print(f"Saved in {run.folder}; hydra-ppo inspect {as_typed(run.folder)} shows the numbers.")
