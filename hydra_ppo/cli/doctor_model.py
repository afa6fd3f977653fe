"""What the doctor says of a model, without its weights: is it whole, can it be a base, where do its answers end."""

from __future__ import annotations

import math
from pathlib import Path

from hydra_ppo.cli.installed import Finding, first_line

ELSE = "use another model, or a folder that holds all of this one"


def examine_model(name_or_path: str) -> list[Finding]:
    """Look at config, names and shapes of the weights, tokenizer and chat template; nothing is raised.

    A run folder's base is looked at, and its own tokenizer.
    """
    from hydra_ppo.model.manifest import MANIFEST, base_folder

    saved = (Path(name_or_path) / MANIFEST).is_file()
    found = []
    for name, look, target in (
        ("model", _model, base_folder(Path(name_or_path)) if saved else name_or_path),
        ("answers end", _ends, name_or_path),
    ):
        try:
            found.append(look(str(target)))
        except Exception as error:
            found.append(Finding(name, f"failed: {first_line(error)}", "problem", ELSE))
    try:
        return found + _servers(Path(name_or_path))
    except Exception as error:
        what, _, start = first_line(error).removeprefix("ConfigError: ").partition("; start it with: ")
        hint = start or "hydra-ppo serve prints how it is started"
        return [*found, Finding("vLLM servers", f"failed: {what}", "problem", hint)]


def _servers(run: Path) -> list[Finding]:
    """Look at the servers that a run samples on; none where it samples itself, or is no run."""
    from hydra_ppo.cli.rollouts import check_servers
    from hydra_ppo.cli.saved import run_config
    from hydra_ppo.config.settings import PPOConfig
    from hydra_ppo.runs.contents import CONFIG

    config = run_config(run) if (run / CONFIG).is_file() else None
    return [Finding("vLLM server", text) for _, text in check_servers(config)] if isinstance(config, PPOConfig) else []


def _model(name_or_path: str) -> Finding:
    from hydra_ppo.model.architecture import inspect_architecture
    from hydra_ppo.model.whole import skeleton

    model = skeleton(name_or_path)
    architecture = inspect_architecture(model)
    size = sum(math.prod(p.shape) for p in model.parameters())
    kinds = ", ".join(dict.fromkeys(architecture.layer_types))
    text = f"{type(model).__name__}, {size / 1e6:.0f} million parameters, {len(architecture.layers)} layers of {kinds}"
    return Finding("model", f"{text}; adapters can sit on {', '.join(architecture.linear_names())}")


def _ends(name_or_path: str) -> Finding:
    from hydra_ppo.cli.example_row import configured_ends, describe_ends
    from hydra_ppo.cli.loading import load_tokenizer
    from hydra_ppo.config.settings import ModelSettings
    from hydra_ppo.data.ends import find_ends

    settings = ModelSettings(name_or_path=name_or_path)
    tokenizer = load_tokenizer(settings)
    ends = find_ends(tokenizer, generation_ids=configured_ends(settings), end_of_turn=None)
    text = describe_ends(ends, tokenizer).removeprefix("answers end at ")
    if ends.notes:
        return Finding("answers end", f"{text}; {'; '.join(ends.notes)}", "note", "data.end_of_turn sets it")
    return Finding("answers end", text)
