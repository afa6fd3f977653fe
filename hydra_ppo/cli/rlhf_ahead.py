"""What can be known of a PPO stage before the SFT run that it begins from is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.cli.dry_run import arithmetic_table, check_data, check_device, check_reward_sources, ppo_arithmetic
from hydra_ppo.cli.rollouts import check_servers
from hydra_ppo.data.rows import split_held_out
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import MANIFEST, UNTRAINED_HEAD, base_folder, read_manifest
from hydra_ppo.runs.folder import check_output
from hydra_ppo.runtime.tables import print_table

if TYPE_CHECKING:
    from hydra_ppo.cli.rlhf_config import Plan


def check_before_sft(plan: Plan, console: Console | None = None) -> None:
    """Check a PPO stage against what its SFT stage will leave: the same base, a reward head that is trained or not.

    Args:
        plan: all stages.
        console: shows what was found, and the batch arithmetic; None shows nothing.

    Raises:
        ConfigError, DataError: the first thing that would stop the stage.
    """
    from hydra_ppo.cli.model_check import check_lengths
    from hydra_ppo.model.whole import skeleton

    config, sft = plan.ppo, plan.sft
    check_device(config)
    name = sft.model.name_or_path
    trained = sft.reward_coef > 0
    if (Path(name) / MANIFEST).is_file():
        trained = trained or bool(read_manifest(Path(name))["reward_head_trained"])
        name = base_folder(Path(name))
    head = next((where for where, source in config.named_sources() if source.kind == "head"), None)
    if head is not None and not trained:
        raise ConfigError(f"{head} is the reward head, which sft.reward_coef=0 does not train. {UNTRAINED_HEAD}")
    found = [("model.name_or_path", f"{config.model.name_or_path}, which sft writes")]
    found += check_reward_sources(config)
    if config.rollout.engine != "native":
        # A server is held against the model that it serves, which has the base of the SFT stage.
        found += check_servers(replace(config, model=replace(config.model, name_or_path=name)))
    found += [
        ("positions", line) for line in check_lengths(config, skeleton(name, trust_remote_code=config.model.trust_remote_code))
    ]
    checked, checked_eval = check_data(config.data, "prompts")
    rows = None if checked is None else len(checked.rows)
    if checked is not None:
        found.append(("data.train", f"{rows:,} rows of prompts, format checked"))
    if checked_eval is not None:
        found.append(("data.eval", f"{len(checked_eval.rows):,} rows of prompts, format checked"))
    elif checked is not None and config.data.eval is None:
        rows = len(split_held_out(checked.rows, config.data.eval_fraction, config.run.seed)[0])
    found.append(("run.output", f"{check_output(replace(config.run, overwrite=True), config, command='ppo')} can be written"))
    if console is None:
        return
    table = Table(title="ppo: checked (before sft has run)", title_justify="left")
    table.add_column("setting")
    table.add_column("found", overflow="fold")
    for setting, text in found:
        table.add_row(setting, Text(text))
    print_table(console, table)
    print_table(console, arithmetic_table(ppo_arithmetic(config, rows)))


def check_export(plan: Plan) -> None:
    """Refuse an export that the runs cannot give.

    Raises:
        ConfigError: naming the role.
    """
    settings = plan.export
    if "reward" not in settings.roles:
        return
    if settings.adapter_only and plan.sft.method == "full":
        raise ConfigError(
            "adapter_only=True with roles=[reward]: sft.method='full' trains the base itself, so the reward model has no "
            "adapter; leave reward out, or adapter_only."
        )
    if plan.sft.reward_coef == 0 and not (Path(plan.sft.model.name_or_path) / MANIFEST).is_file():
        raise ConfigError("roles=[reward] is a head that sft.reward_coef=0 does not train; leave it out.")
