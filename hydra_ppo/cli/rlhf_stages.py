"""The stages of `hydra-ppo rlhf`: what there is of them, what they need, and how each is run."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from hydra_ppo.cli.rlhf_config import CLASSES, STAGES, Plan, read_json
from hydra_ppo.config.paths import PATHS
from hydra_ppo.config.reading import as_values
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.contents import CONFIG, MANIFEST, SUMMARY
from hydra_ppo.runs.folder import has_died, read_state
from hydra_ppo.runtime.files import write_whole

METRICS, ANSWERS = "metrics.json", "answers.jsonl"
"""Files of an evaluation."""
DONE = "export.json"
"""What was exported from which ppo run: those folders may be written again."""


def state_of(plan: Plan, stage: str) -> str | None:
    """Return what has become of a stage: finished, interrupted, ...; None where it has not begun."""
    folder = plan.folder(stage)
    if stage in CLASSES:
        state = read_state(folder)
        if state is None:
            return None
        return "interrupted" if has_died(folder, state) else str(state.get("state"))
    of = _ppo_finished(plan)
    if stage == "evaluate":
        return "finished" if of is not None and read_json(folder / METRICS).get("ppo_finished") == of else None
    found = read_json(plan.output / DONE)
    same = of is not None and found.get("ppo_finished") == of and found.get("export") == as_values(plan.export)
    return "finished" if same and all((folder / role).is_dir() for role in plan.export.roles) else None


def check_stages(plan: Plan, stages: list[str], *, resume: bool, overwrite: bool, asked: bool) -> list[str]:
    """Return those of the stages that are to be run, in order.

    Args:
        stages: of `STAGES`, in order.
        resume: go on with what was begun.
        overwrite: run them again, also where they are finished.
        asked: whether they were named by --stage.

    Raises:
        ConfigError: one needs what is not there, or was begun and is neither to go on nor to be begun again, or is finished
            with other settings than the file has now.
    """
    states = {stage: state_of(plan, stage) for stage in STAGES}
    todo = []
    for stage in stages:
        before = {"sft": None, "ppo": "sft"}.get(stage, "ppo")
        if before is not None and before not in todo and states[before] != "finished":
            raise ConfigError(
                f"stage {stage} needs {plan.folder(before)}, which "
                + ("is not there" if states[before] is None else f"is not finished ({states[before]})")
                + f"; run --stage {before} first"
                + (" with --resume." if states[before] else ".")
            )
        if overwrite:
            todo.append(stage)
        elif before in todo and stage in CLASSES and states[stage] is not None:
            raise ConfigError(
                f"stage {stage} in {plan.folder(stage)} began from an earlier {before}; finish --stage {before} alone, then "
                f"begin it again with --stage {stage} --overwrite, or choose another output."
            )
        elif before in todo:
            todo.append(stage)
        elif states[stage] == "finished":
            if stage in CLASSES:
                _check_fresh(plan, stage)
                if _check_same(plan, stage, goes_on=resume and asked):
                    todo.append(stage)
        elif states[stage] is None or stage not in CLASSES or resume or states[stage] == "starting":
            todo.append(stage)
        else:
            raise ConfigError(
                f"stage {stage} in {plan.folder(stage)} is not finished ({states[stage]}); go on with --resume, or begin it "
                f"again with --stage {stage} --overwrite."
            )
    return todo


def _check_fresh(plan: Plan, stage: str) -> None:
    """Refuse a ppo run that began before the sft run that it stands on was finished last."""
    if stage != "ppo":
        return
    sft, ppo = ((read_state(plan.folder(name)) or {}) for name in ("sft", "ppo"))
    if sft.get("finished") and ppo.get("started") and str(ppo["started"]) < str(sft["finished"]):
        raise ConfigError(
            f"stage ppo in {plan.folder('ppo')} began from an earlier sft; begin it again with --stage ppo --overwrite, or "
            "choose another output."
        )


def _check_same(plan: Plan, stage: str, goes_on: bool) -> bool:
    """Hold a finished stage against the file; return whether it is to go on, as it was asked to.

    Raises:
        ConfigError: it was run with other settings, or is to be longer and nobody asked for that.
    """
    from hydra_ppo.cli.flags import load_config
    from hydra_ppo.cli.resume import LENGTHS, is_free

    kind = CLASSES[stage]
    was, now = (_plain(as_values(config)) for config in (load_config(kind, plan.folder(stage) / CONFIG), getattr(plan, stage)))
    changed = [name for name in now if was.get(name) != now[name] and (name in LENGTHS or not is_free(name))]
    lengths = [name for name in changed if name in LENGTHS]
    if others := [name for name in changed if name not in LENGTHS]:
        what = "; ".join(f"{name} was {was.get(name)!r}, is {now[name]!r}" for name in others)
        raise ConfigError(
            f"stage {stage} in {plan.folder(stage)} is finished with other settings: {what}. Put that back, choose another "
            f"output, or run it again with --stage {stage} --overwrite."
        )
    if lengths and not goes_on:
        what = "; ".join(f"{name} was {was.get(name)!r}, is {now[name]!r}" for name in lengths)
        raise ConfigError(f"stage {stage} in {plan.folder(stage)} is finished: {what}; go on with --stage {stage} --resume.")
    stopped = read_json(plan.folder(stage) / SUMMARY).get("stopped_by")
    if stopped and not goes_on:
        print(f"{stage} is finished: the alarm {stopped} stopped it; --stage {stage} --resume goes on.")
    return goes_on and bool(lengths or stopped)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings by full name, paths as they are found."""
    flat: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    walk(values, "")
    for name in PATHS:
        value = flat.get(name)
        if isinstance(value, str) and os.path.exists(os.path.expanduser(value)):
            flat[name] = os.path.realpath(os.path.expanduser(value))
    return flat


def run_stage(plan: Plan, stage: str, *, resume: bool, overwrite: bool) -> None:
    """Run one stage, by the command that does it alone."""
    from hydra_ppo.cli import commands

    if stage in CLASSES:
        config = getattr(plan, stage)
        config = replace(config, run=replace(config.run, overwrite=overwrite))
        getattr(commands, stage)(config, resume=resume and not overwrite)
    elif stage == "evaluate":
        evaluate(plan)
    else:
        export(plan)


def evaluate(plan: Plan) -> dict[str, Any]:
    """Sample the held-out prompts from the actor that was saved, score them, and write metrics and answers.

    Prompts and random numbers are those of the evaluations in training, so the last of those is found again.
    """
    from transformers import set_seed

    from hydra_ppo.cli import loading
    from hydra_ppo.cli.rollouts import Sampling
    from hydra_ppo.data.rows import load_prompts
    from hydra_ppo.runs.checkpoint import newest_checkpoint
    from hydra_ppo.training.held_out import numbers_of
    from hydra_ppo.training.ppo import PPOTrainer

    folder = plan.folder("ppo")
    config = replace(plan.ppo, model=replace(plan.ppo.model, name_or_path=str(folder)))
    found = newest_checkpoint(folder, print)
    begun = datetime.now() if found is None else datetime.fromisoformat(found.run["begun"])
    set_seed(config.run.seed)
    tokenizer = loading.load_tokenizer(config.model)
    rows, eval_rows, _ = loading.load_rows(partial(load_prompts, now=begun), tokenizer, config.data, config.run.seed)
    metrics: dict[str, Any] = {}
    answers: list[dict[str, Any]] = []
    if eval_rows:
        model = loading.load_model(config.model, train="ppo")
        with ExitStack() as at_the_end:
            sampler = at_the_end.enter_context(Sampling(print).sampler(config, model, rows))
            trainer = PPOTrainer(model, tokenizer, config, rows, eval_rows, sampler=sampler)
            seen = trainer.evaluate(trainer.steps)
        metrics = dict(numbers_of(seen))
        columns = ["responses", "scores", *(["independent"] if "independent" in seen else [])]
        names = {"responses": "response", "scores": "score"}
        answers = [
            {"prompt": row.text} | {names.get(name, name): seen[name][i] for name in columns}
            for i, row in enumerate(trainer.eval_prompts)
        ]
    else:
        print("evaluate: no prompts are held out (data.eval, data.eval_fraction); nothing is evaluated.")
    place = plan.folder("evaluate")
    place.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_whole(place / ANSWERS, text)
    # Last: what says that the evaluation is whole.
    write_whole(place / METRICS, json.dumps({"ppo_finished": _ppo_finished(plan)} | metrics, indent=2) + "\n")
    return metrics


def export(plan: Plan) -> None:
    """Export the roles that the file names, each into a folder of its name."""
    from hydra_ppo.cli import commands

    settings, place = plan.export, plan.folder("export")
    mine = read_json(plan.output / DONE).get("roles", [])
    for role in settings.roles:
        if role in mine and (place / role).is_dir():
            shutil.rmtree(place / role)  # what this command wrote, of an earlier run
        commands.export(plan.folder("ppo"), place / role, role, settings.adapter_only, settings.dtype)
        mine = [*mine, role]
        write_whole(plan.output / DONE, json.dumps({"roles": sorted(set(mine))}) + "\n")
    done = {"roles": sorted(set(mine)), "ppo_finished": _ppo_finished(plan), "export": as_values(settings)}
    write_whole(plan.output / DONE, json.dumps(done, indent=2) + "\n")


def _ppo_finished(plan: Plan) -> str | None:
    """Return when the ppo run was finished last; None where it is not."""
    state = read_state(plan.folder("ppo")) or {}
    whole = state.get("state") == "finished" and (plan.folder("ppo") / MANIFEST).is_file()
    return str(state.get("finished")) if whole else None
