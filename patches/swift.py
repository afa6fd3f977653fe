"""ms-swift 4.6, `swift rlhf --rlhf_type ppo` with LoRA.

    swift rlhf --rlhf_type ppo --model BASE --reward_model runs/sft \\
        --external_plugins "$(python -m hydra_ppo.patches.swift)" ...

The command stays as it was, but for `--reward_model`, which names a folder that `hydra-ppo sft` wrote over BASE, and the
plugin. Swift loads the base once, in the way it always does (quantisation included); its other models are role views. Each
checkpoint is a folder of the same kind. With any other `--reward_model` swift does what it did.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from hydra_ppo.model.manifest import MANIFEST, base_folder, read_manifest
from hydra_ppo.patches.binding import Applied, Bindings, install
from hydra_ppo.patches.versions import HostError, require
from hydra_ppo.views.views import role_views

HOST = "ms-swift"
PLUGIN = Path(__file__).with_name("plugins") / "hydra_swift.py"

ATTRIBUTES = ("model_meta", "model_info", "model_dir")
"""What swift's loader notes on a model and its trainer reads from the policy."""


def apply() -> Applied:
    """Patch swift's pipeline for `rlhf`, and TRL's trainer under it; both are inert for models that are not role views.

    Returns:
        No arguments for anything: swift makes its models itself. As a context manager, or by `undo()`, it leaves swift, TRL
        and the views of models in use as they were.

    Raises:
        HostError: for versions outside ms-swift 4.6, and of TRL outside 0.12 to 1.12.
    """
    require("ms-swift", "4.6", "4.7")
    require("trl", "0.12", "1.13")
    from hydra_ppo.patches import trl_train

    trl = trl_train.install_trainer()
    try:
        install(HOST, _bind)
    except BaseException:
        trl.undo()
        raise
    return _Applied(trl)


class _Applied(Applied):
    """Undoes the patch of TRL with that of swift."""

    def __init__(self, trl: Applied) -> None:
        super().__init__(HOST, {})
        self._trl = trl

    def undo(self) -> None:
        super().undo()
        self._trl.undo()


# -- what is refused -----------------------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """A setting that is refused unless it is empty (None, False, 0, or without items) or among `allowed`."""

    setting: str
    allowed: Collection[Any]
    rule: str
    remedy: str


_SAVED_SHAPE = "but adapters have the shape and start of the saved ones"
_ONE_BASE = "but actor and reference stand on --model and the saved adapters"
_ONE_PROCESS = "which shards or copies a base that all roles share"
_PLAIN_OPTIMIZER = "which sorts parameters by the modules of a model that it looks into"
_ONE_ADAPTER = "but swift loads one adapter into a policy, and a checkpoint holds those of all roles"
_LEAVE_OUT = "leave it out"

REFUSALS = (
    Refusal("tuner_type", ("lora",), "but role views train LoRA adapters", "use --tuner_type lora"),
    Refusal("tuner_backend", ("peft",), "which loads a model of its own kind", "use --tuner_backend peft"),
    Refusal("use_swift_lora", (), "but role views train PEFT's LoRA adapters", _LEAVE_OUT),
    Refusal("task_type", ("causal_lm",), "but the actor is a causal LM", "use --task_type causal_lm"),
    Refusal("reward_adapters", (), "but the reward model is the base with the saved adapter and head", _LEAVE_OUT),
    Refusal("adapters", (), _ONE_BASE, "name the adapters' folder by --reward_model alone"),
    Refusal("ref_model", (), _ONE_BASE, _LEAVE_OUT),
    Refusal("ref_adapters", (), _ONE_BASE, _LEAVE_OUT),
    Refusal("use_dora", (), _SAVED_SHAPE, _LEAVE_OUT),
    Refusal("init_weights", (True, "true"), _SAVED_SHAPE, _LEAVE_OUT),
    Refusal("modules_to_save", (), _SAVED_SHAPE, _LEAVE_OUT),
    Refusal("target_parameters", (), _SAVED_SHAPE, _LEAVE_OUT),
    Refusal("lora_bias", ("none",), _SAVED_SHAPE, _LEAVE_OUT),
    Refusal("lorap_lr_ratio", (), _PLAIN_OPTIMIZER, _LEAVE_OUT),
    Refusal("use_galore", (), _PLAIN_OPTIMIZER, _LEAVE_OUT),
    Refusal("optimizer", ("default",), _PLAIN_OPTIMIZER, "leave it out; --optim chooses among transformers' own"),
    Refusal("deepspeed", (), _ONE_PROCESS, _LEAVE_OUT),
    Refusal("fsdp", (), _ONE_PROCESS, _LEAVE_OUT),
    Refusal("sequence_parallel_size", (1,), _ONE_PROCESS, "use --sequence_parallel_size 1"),
    Refusal("use_ray", (), _ONE_PROCESS, _LEAVE_OUT),
    Refusal("use_liger_kernel", (), "which replaces layers that the adapters stand on", _LEAVE_OUT),
    Refusal("use_flash_ckpt", (), "which writes whole models, not adapters", _LEAVE_OUT),
    Refusal("resume_from_checkpoint", (), _ONE_ADAPTER, "name it by --reward_model: a fresh optimizer"),
    Refusal("load_best_model_at_end", (), _ONE_ADAPTER, _LEAVE_OUT),
)


def hydra_folder(args: Any) -> Path | None:
    """Return the folder of a saved HydraModel that `--reward_model` of a PPO run names; None where there is no such thing."""
    if args.rlhf_type != "ppo":
        return None
    folders = [Path(name) for name in _listed(args.reward_model) if (Path(name) / MANIFEST).is_file()]
    return folders[0] if folders else None


def refuse(args: Any) -> None:
    """Check swift's arguments against what role views can do, before anything is loaded.

    Args:
        args: RLHFArguments, of which absent ones count as empty.

    Raises:
        HostError: naming the setting.
    """
    if len(_listed(args.reward_model)) != 1:
        raise HostError(f"reward_model={args.reward_model!r}, but a HydraModel is the one reward model; name its folder alone.")
    for setting, allowed, rule, remedy in REFUSALS:
        value = getattr(args, setting, None)
        if value and value not in allowed:
            raise HostError(f"{setting}={value!r}, {rule}; {remedy}.")
    if getattr(getattr(args, "model_meta", None), "is_multimodal", False):
        raise HostError(f"model={args.model!r} is multimodal, but role views run on token ids; use a text model.")


def check_saved(folder: Path, args: Any) -> None:
    """Check that the saved model stands on the base that swift is to load, and has a reward head.

    Raises:
        HostError: naming both bases; or where the reward head was never trained.
    """
    base = base_folder(folder)
    given = [str(name) for name in (args.model, getattr(args, "model_dir", None)) if name]
    if base not in given and Path(base).resolve() not in [Path(name).resolve() for name in given]:
        base = str(Path(base).resolve()) if base.startswith("..") else base
        raise HostError(
            f"model={args.model!r} is not {base!r}, which {str(folder / MANIFEST)!r} names as the base that its adapters were "
            f"trained on; use --model {base}."
        )
    if not read_manifest(folder)["reward_head_trained"]:
        raise HostError(f"reward_model={str(folder)!r} has a reward head that was never trained; run hydra-ppo sft first.")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


# -- what is replaced ----------------------------------------------------------------------------------------------------


def _bind(bindings: Bindings) -> None:
    import torch.utils.checkpoint as checkpointing
    from swift.pipelines.train.rlhf import SwiftRLHF

    from hydra_ppo.compute import recompute

    # Swift's trainer makes the global `checkpoint` reentrant for good, in any process where one was made.
    if recompute.checkpoint is not getattr(checkpointing, "_old_checkpoint", checkpointing.checkpoint):
        raise HostError("hydra_ppo was imported after swift made a trainer; import it first, or use a new process.")
    bindings.set(SwiftRLHF, "_prepare_model_tokenizer", _prepare_model_tokenizer(SwiftRLHF._prepare_model_tokenizer, bindings))
    bindings.set(SwiftRLHF, "prepare_model", classmethod(_prepare_model(SwiftRLHF.prepare_model.__func__)))
    bindings.set(SwiftRLHF, "_prepare_template", _prepare_template(SwiftRLHF._prepare_template))


def _prepare_model_tokenizer(original: Any, bindings: Bindings) -> Any:
    def _prepare_model_tokenizer(self: Any) -> None:
        from swift.utils import get_logger

        args = self.args
        folder = hydra_folder(args)
        if folder is None:
            found = f"reward_model={getattr(args, 'reward_model', None)!r} holds no {MANIFEST}"
            reason = found if args.rlhf_type == "ppo" else f"rlhf_type={args.rlhf_type!r} is not 'ppo'"
            get_logger().info(f"hydra-ppo leaves this run as it is: {reason}.")
            original(self)
        else:
            refuse(args)
            check_saved(folder, args)
            _load(self, folder, bindings)

    return _prepare_model_tokenizer


def _load(pipeline: Any, folder: Path, bindings: Bindings) -> None:
    """Load the base as swift loads a policy, and make the views of its roles what swift's trainer gets."""
    from swift.pipelines.train.sft import SwiftSft
    from swift.utils import get_logger, get_model_parameter_info, is_mp

    from hydra_ppo.model.hydra import HydraModel

    args, logger = pipeline.args, get_logger()
    if is_mp() and args.device_map is None:
        raise HostError("device_map=None would split the base over the GPUs in sight; set CUDA_VISIBLE_DEVICES to one of them.")
    SwiftSft._prepare_model_tokenizer(pipeline)
    base = pipeline.model
    devices = set(getattr(base, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise HostError(f"device_map={args.device_map!r} split the base over {devices}; use one device.")
    if not Path(args.model).is_dir():
        base.name_or_path = args.model  # a name of the hub, not where it lies in this machine's cache
    model = HydraModel(base, train="ppo", saved=folder)
    _switch_checkpointing(model, args.training_args)
    views = role_views(model)
    for name in ATTRIBUTES:
        bindings.set(views.actor, name, getattr(base, name))
    pipeline.model, pipeline.ref_model = views.actor, views.reference
    pipeline.value_model, pipeline.reward_model = views.critic, views.reward
    pipeline.teacher_model = None
    pipeline.train_msg["value_model_parameter_info"] = get_model_parameter_info(views.critic)
    shape = model.base.peft_config["actor"]
    logger.warning(
        f"actor, reference, critic and reward model share one base; their adapters are those of {str(folder)!r} (r={shape.r}, "
        f"lora_alpha={shape.lora_alpha}, no dropout), so lora_rank, lora_alpha, lora_dropout, lora_dtype, use_rslora and "
        "target_modules do nothing."
    )


def _switch_checkpointing(model: Any, training_args: Any) -> None:
    """Checkpoint where that is asked for by name: swift's PPO never does, while its `gradient_checkpointing` is on."""
    from swift.utils import get_logger

    if not training_args.gradient_checkpointing:
        return
    options = training_args.gradient_checkpointing_kwargs or {}
    if options.get("use_reentrant") is False:
        model.enable_checkpointing()
        get_logger().info("gradient_checkpointing=True: activations of each layer are recomputed in its own role.")
    else:
        training_args.gradient_checkpointing = False
        get_logger().info(
            "gradient_checkpointing=True does nothing in swift's PPO; for less memory and a slower update add "
            """--gradient_checkpointing_kwargs '{"use_reentrant": false}'."""
        )


def _prepare_model(original: Any) -> Any:
    def prepare_model(cls: Any, args: Any, model: Any, **options: Any) -> Any:
        from hydra_ppo.views.view import View

        return model if isinstance(model, View) else original(cls, args, model, **options)

    return prepare_model


def _prepare_template(original: Any) -> Any:
    def _prepare_template(self: Any) -> None:
        from hydra_ppo.views.view import View

        original(self)
        if isinstance(self.model, View):
            self.template.save_callback = _save

    return _prepare_template


def _save(view: Any, folder: str) -> None:
    view.save_pretrained(folder)


if __name__ == "__main__":
    print(PLUGIN)
