"""`hydra-ppo rlhf FILE`: joint SFT and reward model, PPO, evaluation and export, from one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.parser import Parser, check_folder
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError
from hydra_ppo.runtime.interruption import StopRequested, stopping_on_signals
from hydra_ppo.runtime.output import losing_output

if TYPE_CHECKING:
    from hydra_ppo.cli.rlhf_config import Plan

TRAINED = ("sft", "ppo")
SECTION_FLAGS = " --sft.NAME VALUE and --ppo.NAME VALUE change settings of a stage; --help of hydra-ppo sft and ppo lists them."


def rlhf(arguments: list[str]) -> None:
    """Run `hydra-ppo rlhf`."""
    from hydra_ppo.cli.rlhf_config import STAGES, print_plan, read_plan

    flags, rest = _split(arguments)
    parser = Parser("rlhf", "Joint SFT and reward model, PPO, evaluation and export, from one file." + SECTION_FLAGS)
    parser.add_argument("file", nargs="?", metavar="FILE", type=local_path, help="YAML; --print-config writes one.")
    parser.add_argument("--output", type=local_path, metavar="DIR", help="Folder of all stages, in place of the file's.")
    parser.add_argument("--stage", nargs="+", choices=STAGES, metavar="STAGE", help=f"Only these, of {', '.join(STAGES)}.")
    parser.add_argument("--resume", action="store_true", help="Go on with the stage that was stopped, then with the others.")
    parser.add_argument("--overwrite", action="store_true", help="Run the stages again from the start, also finished ones.")
    parser.add_argument("--dry-run", action="store_true", help="Check all of them, load no weights, train nothing.")
    parser.add_argument("--print-config", action="store_true", help="Write a file of all settings with their help.")
    options = parser.parse_args(rest)
    if options.print_config:
        print(print_plan(), end="")
        return
    if options.file is None:
        raise ConfigError("no file is named; write hydra-ppo rlhf FILE.yaml (--print-config shows what is in it).")
    if options.resume and options.overwrite:
        raise ConfigError("--resume goes on and --overwrite begins again; leave one out.")
    plan = read_plan(options.file, flags, options.output)
    check_folder("output", plan.output)
    from hydra_ppo.cli.rlhf_stages import check_stages

    stages = [stage for stage in STAGES if stage in (options.stage or STAGES)]
    how = {"resume": options.resume, "overwrite": options.overwrite}
    todo = check_stages(plan, stages, asked=options.stage is not None, **how)
    with losing_output(), stopping_on_signals():
        _check_ahead(plan, todo, show=options.dry_run, **how)
        if options.dry_run:
            print("To be run: " + (", ".join(todo) or "nothing, all is finished") + ".")
            return
        _run(plan, stages, todo, **how)


def _run(plan: Plan, stages: list[str], todo: list[str], *, resume: bool, overwrite: bool) -> None:
    from hydra_ppo.cli.rlhf_stages import run_stage
    from hydra_ppo.runtime.output import as_typed

    for stage in stages:
        if stage not in todo:
            print(f"{stage}: finished, in {plan.folder(stage)}")
            continue
        print(f"{stage}: begins, in {plan.folder(stage)}", flush=True)
        try:
            run_stage(plan, stage, resume=resume, overwrite=overwrite)
        except StopRequested:
            print(f"Stopped in the stage {stage}. Go on with all: hydra-ppo rlhf {as_typed(plan.path)} --resume", flush=True)
            raise
    from hydra_ppo.cli.rlhf_report import report

    report(plan)


def _check_ahead(plan: Plan, todo: list[str], *, resume: bool, overwrite: bool, show: bool) -> None:
    """Check the configs of all stages that are to run, as far as anything can be known before the first of them runs.

    Raises:
        ConfigError, DataError: the first thing that would stop one of them.
    """
    from dataclasses import replace

    from rich.console import Console

    from hydra_ppo.cli.dry_run import check_files, dry_run

    if "sft" in todo:
        sft = replace(plan.sft, run=replace(plan.sft.run, overwrite=overwrite))
        _named("sft", lambda: dry_run(sft, resume=resume) if show else check_files(sft))
    if "ppo" in todo:
        ppo = replace(plan.ppo, run=replace(plan.ppo.run, overwrite=overwrite))
        if "sft" in todo:
            from hydra_ppo.cli.rlhf_ahead import check_before_sft

            _named("ppo", lambda: check_before_sft(plan, Console() if show else None))
        else:
            _named("ppo", lambda: dry_run(ppo, resume=resume) if show else check_files(ppo))
    if "export" in todo:
        from hydra_ppo.cli.rlhf_ahead import check_export

        _named("export", lambda: check_export(plan))


def _named(stage: str, check: Any) -> None:
    """Say of which stage an error is."""
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{stage}: {error}") from error


def _split(arguments: list[str]) -> tuple[Mapping[str, list[str]], list[str]]:
    """Split off the settings of stages: `--sft.NAME VALUE`, `--ppo.NAME=VALUE`, without the stage in front."""
    flags: dict[str, list[str]] = {stage: [] for stage in TRAINED}
    rest, others = list(arguments), []
    while rest:
        argument = rest.pop(0)
        stage = argument[2:].partition(".")[0]
        if not argument.startswith("--") or stage not in TRAINED or "." not in argument:
            others.append(argument)
            continue
        flags[stage].append("--" + argument[3 + len(stage) :])
        if "=" not in argument and rest and not rest[0].startswith("--"):
            flags[stage].append(rest.pop(0))
    return flags, others


RLHF = ("SFT and reward model, PPO, evaluation and export, from one file", rlhf)
