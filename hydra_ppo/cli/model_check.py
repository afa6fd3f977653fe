"""What can be known of a run's model before a weight is read: whether it is whole, its stage, its longest row.

The names and shapes in its files are held against the architecture that its config describes, on the meta device.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.folder import has_died, is_locked, read_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_ADAPTER = (
    "sft_coef=0 trains no policy: the reward model gets an adapter of its own, 'reward', and the policy that PPO starts from "
    "stays as it was"
)


def check_contents(config: SFTConfig | PPOConfig) -> list[tuple[str, str]]:
    """Hold what lies in the model's files against what the run needs of them; return what a user should know, by subject.

    Raises:
        ConfigError, UnsupportedModelError: what the run would raise while it loads the model.
    """
    from hydra_ppo.model.architecture import inspect_architecture
    from hydra_ppo.model.heads import head_plan, settled_plan
    from hydra_ppo.model.manifest import MANIFEST, UNSCORED, UNTRAINED_HEAD, base_folder, check_base, read_manifest
    from hydra_ppo.model.quantized_embeddings import check_width
    from hydra_ppo.model.roles import build_stage
    from hydra_ppo.model.whole import skeleton
    from hydra_ppo.rewards.ensembles import check_aggregates

    name = config.model.name_or_path
    saved = Path(name) if (Path(name) / MANIFEST).is_file() else None
    manifest = read_manifest(saved) if saved is not None else None
    if isinstance(config, SFTConfig):
        config.check_policy()
    else:
        own = any(source.kind == "head" and source.target is None for _, source in config.named_sources())
        trained = manifest is not None and manifest["reward_head_trained"]
        if own and not trained:
            raise ConfigError(UNTRAINED_HEAD)
        if config.rehearsal.data is not None and not trained:
            raise ConfigError(UNSCORED)
    plan = settled_plan(head_plan(config), manifest)
    if isinstance(config, PPOConfig):
        check_aggregates(config.reward, plan.reward)
    build_stage(config.stage, manifest["roles"] if manifest else {})
    if saved is not None:
        check_base(saved, base_folder(saved))
    if isinstance(config, PPOConfig):
        _check_heads(config, name)
    empty = skeleton(base_folder(saved) if saved is not None else name, trust_remote_code=config.model.trust_remote_code)
    inspect_architecture(empty)
    if config.model.quantize_embeddings is not None:
        check_width(empty, config.model.quantize_embeddings)
    lengths = check_lengths(config, empty)
    if config.model.adapter is not None:
        _check_brought(empty, config.model.adapter, saved)
    if saved is not None:
        _check_saved(empty, saved, read_manifest(saved))
    return [("positions", line) for line in lengths] + [("adapter", line) for line in what_to_know(config)]


def _check_heads(config: PPOConfig, name: str) -> None:
    """Hold the heads of other folders against base and reward adapter.

    Raises:
        ConfigError: where they were trained on states of others.
    """
    from hydra_ppo.model.origin import check_files
    from hydra_ppo.rewards.stored_heads import read_heads

    for setting, source in config.named_sources():
        if source.kind == "head" and source.target is not None:
            check_files(read_heads(Path(source.target)).origin, name, f"{setting}.target={source.target!r}")


def _check_brought(empty: PreTrainedModel, name: str, saved: Path | None) -> None:
    """Hold an adapter from elsewhere against the base.

    Raises:
        ConfigError: where it does not fit, or a run of this program is the base.
    """
    from hydra_ppo.model.adapter_options import adapter_folder, saved_options
    from hydra_ppo.model.adapters import check_fit, put_adapter
    from hydra_ppo.model.whole import tensor_shapes

    folder = adapter_folder(name)
    if saved is not None:
        raise ConfigError(
            f"model.adapter={name!r} does not go with a run of this program, which brings its own; name the plain base."
        )
    base = put_adapter(empty, "sft", saved_options(folder), None)
    check_fit(base, "sft", folder, tensor_shapes(folder / "adapter_model.safetensors"))


def _check_saved(empty: PreTrainedModel, saved: Path, manifest: dict[str, Any]) -> None:
    """Hold adapters and heads of a saved model against its base.

    Raises:
        ConfigError: where one lacks something, or belongs to another base.
    """
    from peft import PeftModel

    from hydra_ppo.model.adapter_options import saved_options
    from hydra_ppo.model.adapters import check_fit, put_adapter
    from hydra_ppo.model.architecture import inspect_architecture
    from hydra_ppo.model.heads import saved_plan, scalar_heads
    from hydra_ppo.model.saving import HEADS, check_heads
    from hydra_ppo.model.whole import tensor_shapes

    architecture = inspect_architecture(empty)
    heads = scalar_heads(architecture.hidden_size, empty.device, saved_plan(manifest))
    check_heads(saved, manifest, heads, tensor_shapes(saved / HEADS))
    base: PreTrainedModel | PeftModel = empty
    for adapter in manifest["adapters"]:
        folder = saved / adapter
        base = put_adapter(base, adapter, saved_options(folder), None)
        check_fit(base, adapter, folder, tensor_shapes(folder / "adapter_model.safetensors"))


def check_lengths(config: SFTConfig | PPOConfig, causal_lm: PreTrainedModel) -> list[str]:
    """Refuse rows beyond a table of positions; return a line on those beyond the positions that the model was trained for.

    Raises:
        ConfigError: naming the settings.
    """
    from hydra_ppo.model.positions import check_length

    data = config.data
    name, answer = "data.max_response_tokens", data.max_response_tokens
    if isinstance(config, PPOConfig):
        name, answer = "rollout.max_new_tokens", config.rollout.max_new_tokens
    settings = f"data.max_prompt_tokens={data.max_prompt_tokens} and {name}={answer}"
    line = check_length(causal_lm, data.max_prompt_tokens + answer, settings)
    return [] if line is None else [line]


def what_to_know(config: SFTConfig | PPOConfig) -> list[str]:
    """Return lines on what a run does otherwise than its settings may seem to say."""
    silent = isinstance(config, SFTConfig) and config.stage == "reward" and config.adapter == "sft"
    unfinished = _unfinished(config.model.name_or_path)
    return ([OWN_ADAPTER] if silent else []) + ([] if unfinished is None else [unfinished])


def _unfinished(name_or_path: str) -> str | None:
    """Say that a model is what a run has come to that is not finished; None where it is no run, or a finished one.

    Raises:
        ConfigError: where the run is going on: what is read now is something else in a moment.
    """
    folder = Path(name_or_path)
    state = read_state(folder) if folder.is_dir() else None
    if state is None or state.get("state") == "finished":
        return None
    if is_locked(folder):
        raise ConfigError(
            f"model.name_or_path={name_or_path!r} is being written by process {state.get('pid')}; wait for it, or name one of "
            "its checkpoints."
        )
    verdict = "interrupted" if has_died(folder, state) else state.get("state")
    return (
        f"model.name_or_path={name_or_path!r} is a run that is not finished ({verdict}): taken is what it saved last; "
        f"hydra-ppo {state.get('command')} {folder / 'config.yaml'} --resume ends it."
    )
