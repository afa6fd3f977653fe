"""The table at the end of `hydra-ppo rlhf`: what came of all stages, and where it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.cli.rlhf_config import read_json
from hydra_ppo.cli.rlhf_stages import ANSWERS, DONE, METRICS
from hydra_ppo.runs.contents import SUMMARY
from hydra_ppo.runtime.files import write_whole
from hydra_ppo.runtime.tables import print_table

if TYPE_CHECKING:
    from hydra_ppo.cli.rlhf_config import Plan


def report(plan: Plan) -> dict[str, Any]:
    """Write `summary.json` of all stages and print it; what is not there yet is null, and "-".

    Returns:
        What is written.
    """
    sft, ppo = (read_json(plan.folder(stage) / SUMMARY) for stage in ("sft", "ppo"))
    evaluated = read_json(plan.folder("evaluate") / METRICS)
    before, after = ppo.get("eval_scores_before"), ppo.get("eval_scores_after")
    summary: dict[str, Any] = {
        "sft_perplexity": sft.get("eval/perplexity"),
        "reward_accuracy": sft.get("eval/reward_accuracy"),
        "score_before": before,
        "score_after": after,
        "score_gain": None if before is None or after is None else after - before,
        "score_gain_se": ppo.get("eval_scores_gain_se"),
        "kl": ppo.get("eval_kl"),
        **{f"independent_{name}": ppo.get(f"eval_independent_{name}") for name in ("before", "after", "gain", "gain_se")},
        "evaluated_score": evaluated.get("eval/scores"),
        "evaluated_independent": evaluated.get("eval/independent"),
        "alarms": ppo.get("alarms", []),
        "stopped_by": ppo.get("stopped_by"),
        "exported": read_json(plan.output / DONE).get("roles", []),
    }
    write_whole(plan.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    table = Table(title="All stages", title_justify="left", show_header=False)
    for name, text in _rows(plan, summary):
        table.add_row(name, Text(text))
    print_table(Console(), table)
    return summary


def _rows(plan: Plan, summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("SFT perplexity, held-out", _number(summary["sft_perplexity"])),
        ("reward accuracy, held-out pairs", _number(summary["reward_accuracy"])),
        ("score before and after", f"{_number(summary['score_before'])} and {_number(summary['score_after'])}"),
        ("gain, with its standard error", f"{_number(summary['score_gain'])} ± {_number(summary['score_gain_se'])}"),
        ("KL from the reference", f"{_number(summary['kl'])} nats per response"),
    ]
    if plan.ppo.eval_rewards:
        gain = f"gain {_number(summary['independent_gain'])} ± {_number(summary['independent_gain_se'])}"
        both = f"{_number(summary['independent_before'])} and {_number(summary['independent_after'])}"
        found.append(("independent evaluator, before and after", f"{both}, {gain}"))
    raised = ", ".join(f"{alarm['name']} at step {alarm['step']}" for alarm in summary["alarms"]) or "none"
    stopped = f"; stopped by {summary['stopped_by']}" if summary["stopped_by"] else ""
    found.append(("alarms", raised + stopped))
    found += [(stage, str(plan.folder(stage))) for stage in ("sft", "ppo") if plan.folder(stage).is_dir()]
    if (answers := plan.folder("evaluate") / ANSWERS).is_file():
        found.append(("answers to held-out prompts", str(answers)))
    found += [("exported", str(plan.folder("export") / role)) for role in summary["exported"]]
    if (plots := plan.folder("ppo") / "plots").is_dir():
        found.append(("plots", str(plots)))
    return found


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
