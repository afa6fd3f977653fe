"""`hydra-ppo profile` and `hydra-ppo plan`: arguments. torch is imported once they are known to be good."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hydra_ppo.cli.parser import Parser, check_folder
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.workload import (
    ADVANTAGES,
    KV_CACHES,
    OPTIMIZERS,
    QUANTIZATIONS,
    REWARD_LOSSES,
    ROLLOUT_WEIGHTS,
    UPDATE_ORDERS,
    Workload,
)

STAGES = {"ppo": ("full", "lora", "dlora", "j-hydra", "hydra"), "reward": ("full", "lora"), "sft": ("full", "lora")}
"""Methods by stage."""


def profile(arguments: list[str]) -> None:
    """Run `hydra-ppo profile`."""
    parser = Parser("profile", "Measure or simulate the memory of one PPO step, by phase, role and kind, to the byte.")
    parser.add_argument("--model", metavar="NAME", help="Shipped name, model folder or config.json; weights are random.")
    parser.add_argument("--simulate", action="store_true", help="Use tensors without memory: any model, no GPU, no download.")
    parser.add_argument(
        "--methods", type=_names, default=None, metavar="A,B", help="Compare these: full, lora, dlora, j-hydra, hydra."
    )
    parser.add_argument(
        "--stage",
        choices=STAGES,
        default="ppo",
        help="ppo, or training the reward model: alone (reward) or with the SFT model (sft); methods full, lora.",
    )
    add_sizes(parser)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="How linear layers of the base are held.")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the adapters.")
    parser.add_argument("--rollout-batch", type=int, default=8, help="Responses per PPO step (other stages: pairs per step).")
    parser.add_argument("--minibatch", type=int, default=None, help="Responses per optimizer step; default: all.")
    parser.add_argument(
        "--microbatch", type=int, default=1, help="Responses (other stages: pairs) per forward and backward pass."
    )
    parser.add_argument("--score-batch", type=int, default=1, help="Responses per scoring pass.")
    parser.add_argument(
        "--trunk-layers",
        type=_numbers,
        default=[0],
        metavar="K",
        help="Adapters sit on the layers above this many; --learning compares a list (0,1,2), with --methods hydra.",
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="Keep activations instead of recomputing them.")
    parser.add_argument(
        "--quantize-embeddings", choices=("int8", "nf4"), default=None, help="How embeddings and output head are held."
    )
    parser.add_argument("--checkpoint-offload", action="store_true", help="Keep the layers' checkpoints in host memory.")
    parser.add_argument(
        "--tile-tokens", type=int, default=None, metavar="N", help="Run MLPs and norms over pieces of N tokens."
    )
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="auto", help="Keys and values while sampling.")
    parser.add_argument("--rollout-weights", choices=ROLLOUT_WEIGHTS, default="shared", help="What decoding multiplies with.")
    parser.add_argument("--device", default="auto", help="Of a real run: auto, cpu, cuda or cuda:N.")
    parser.add_argument("--timed-steps", type=int, default=2, help="Of a real run: more steps, for responses per second.")
    parser.add_argument("--json", action="store_true", help="Write numbers as JSON, all in bytes.")
    parser.add_argument("--output", type=local_path, metavar="DIR", help="Also write record.json, pictures, report.html there.")
    parser.add_argument("--from", dest="record", type=local_path, metavar="FILE", help="Draw a saved record.json again.")
    parser.add_argument(
        "--learning", action="store_true", help="Train all methods on the quickstart's task and judge them; about an hour."
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="How AdamW keeps its moments.")
    parser.add_argument("--update-order", choices=UPDATE_ORDERS, default="together", help="How actor and critic are stepped.")
    parser.add_argument("--offload-in-rollout", action="store_true", help="Moments are in host memory while sampling, scoring.")
    parser.add_argument(
        "--world", type=int, default=1, metavar="N", help="Simulate rank 0 of N processes; batches are those of all."
    )
    parser.add_argument("--shard-base", action="store_true", help="Each of them holds a part of every decoder layer.")
    parser.add_argument("--reward-loss", choices=REWARD_LOSSES, default="bradley-terry", help="Of --stage reward or sft.")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="A,B", help="Seeds of --learning.")
    options = parser.parse_args(arguments)
    methods = options.methods or ["hydra" if options.stage == "ppo" else "lora"]
    for method in methods:
        if method not in STAGES[options.stage]:
            raise ConfigError(
                f"methods={method!r} is not a method of stage={options.stage!r}; choose among "
                f"{', '.join(STAGES[options.stage])}."
            )
    if options.output is not None:
        check_folder("output", options.output)
    from hydra_ppo.profiling.cli import commands

    if options.learning:
        chosen = options.methods or list(STAGES["ppo"])
        commands.learning(options.output, chosen, options.seeds, options.trunk_layers, options.json)
    elif options.record is not None:
        commands.redraw(options.record, options.output, options.json, many=len(options.methods or []) > 1)
    else:
        workload = Workload(
            model=_required(options.model),
            quantization=None if options.quantization == "none" else options.quantization,
            **sizes_of(options),
            rank=options.rank,
            rollout_batch=options.rollout_batch,
            minibatch=options.minibatch,
            microbatch=options.microbatch,
            score_batch=options.score_batch,
            trunk_layers=_single("trunk_layers", options.trunk_layers),
            checkpointing=not options.no_checkpointing,
            quantize_embeddings=options.quantize_embeddings,
            optimizer=options.optimizer,
            update_order=options.update_order,
            offload_in_rollout=options.offload_in_rollout,
            checkpoint_offload=options.checkpoint_offload,
            tile_tokens=options.tile_tokens,
            kv_cache=options.kv_cache,
            rollout_weights=options.rollout_weights,
            world=options.world,
            shard_base=options.shard_base,
            reward_loss=options.reward_loss,
        )
        if workload.world > 1 and not options.simulate:
            raise ConfigError(f"world={workload.world} is simulated, in one process; add --simulate.")
        commands.profile(
            workload,
            methods,
            stage=options.stage,
            simulate=options.simulate,
            device=options.device,
            timed_steps=options.timed_steps,
            output=options.output,
            as_json=options.json,
            as_table=options.methods is not None,
        )


def plan(arguments: list[str]) -> int:
    """Run `hydra-ppo plan`."""
    parser = Parser("plan", "Find the settings with which PPO on a model fits a GPU, by simulation.")
    parser.add_argument("--model", metavar="NAME", help="Shipped name, model folder or config.json.")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="Memory of the GPU, for example 8GiB, 24GB or bytes.")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="How many of them: one process each.")
    add_sizes(parser)
    parser.add_argument(
        "--margin", metavar="SIZE", default=None, help="Memory kept free; by default 0.4 GiB and 3 percent of the GPU."
    )
    parser.add_argument("--count", type=int, default=5, help="Set-ups to show.")
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.add_argument(
        "--output",
        type=local_path,
        metavar="FILE",
        help="Write the best set-up as YAML of hydra-ppo ppo; never over a file.",
    )
    options = parser.parse_args(arguments)
    if options.gpu_memory is None:
        raise ConfigError("gpu_memory is missing; give --gpu-memory, for example --gpu-memory 8GiB.")
    memory = parse_size("gpu_memory", options.gpu_memory)
    margin = None if options.margin is None else parse_size("margin", options.margin)
    if options.output is not None and options.output.exists():
        raise ConfigError(f"output={str(options.output)!r} exists; name another file.")
    if options.output is not None:
        check_folder("output", options.output.parent)
    if options.gpus < 1:
        raise ConfigError(f"gpus={options.gpus} must be at least 1; choose a positive number.")
    if options.count < 1:
        raise ConfigError(f"count={options.count} must be at least 1; choose a positive number.")
    from hydra_ppo.profiling.cli import commands

    sizes = sizes_of(options)
    workload = Workload(model=_required(options.model), rollout_batch=8 * options.gpus, world=options.gpus, **sizes)
    return commands.plan(workload, memory, margin, options.count, options.output, options.json)


def init(arguments: list[str]) -> int:
    """Run `hydra-ppo init`."""
    parser = Parser(
        "init", "Write a project folder that runs: sft.yaml and ppo.yaml that fit a card, reward.py, example pairs."
    )
    parser.add_argument("--model", metavar="NAME", help="Shipped name, hub name of one of these, or model folder.")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="Memory of the GPU, for example 8GiB or 24GB; default is that of the GPU here."
    )
    parser.add_argument("--output", type=local_path, metavar="DIR", help="Folder to write; default is the model's last name.")
    add_sizes(parser)
    options = parser.parse_args(arguments)
    memory = None if options.gpu_memory is None else parse_size("gpu_memory", options.gpu_memory)
    model = _required(options.model)
    folder = options.output or Path(Path(model).resolve().name.lower())
    check_folder("output", folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output={str(folder)!r} is not empty; name another folder with --output.")
    from hydra_ppo.profiling.cli import commands
    from hydra_ppo.profiling.subjects.shapes import model_config

    model_config(model)  # what is no model is said before anything is simulated
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    return commands.init(Workload(model=model, **sizes_of(options)), memory, folder)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that both commands have."""
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="Compute type.")
    parser.add_argument("--prompt", type=int, default=512, help="Tokens of a prompt.")
    parser.add_argument("--response", type=int, default=512, help="Tokens of a response.")
    parser.add_argument("--advantage", choices=ADVANTAGES, default="gae", help="All but gae have no critic.")
    parser.add_argument("--ema", action="store_true", help="Keep a running mean of the actor's adapter.")
    parser.add_argument("--ptx", action="store_true", help="Practise answers beside PPO; rehearsal holds the same.")
    parser.add_argument("--reward-heads", type=int, default=1, metavar="K", help="Members of the reward head.")


def sizes_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_sizes` added, as fields of a workload."""
    names = ("dtype", "prompt", "response", "advantage", "ema", "ptx", "reward_heads")
    return {name: getattr(options, name) for name in names}


UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "B": 1, "": 1}


def parse_size(setting: str, text: str) -> int:
    """Turn 8GiB, 24GB or a number of bytes into bytes.

    Raises:
        ConfigError: when it is none of these, or not above 0.
    """
    number = text.rstrip("GiMBb ").strip()
    unit = text[len(number) :].strip()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{setting}={text!r} is not a size; write it like 8GiB, 24GB or a number of bytes.")
    return size


def _required(model: str | None) -> str:
    if not model:
        raise ConfigError("model is missing; give --model, for example --model llama-3.1-8b.")
    return model


def _single(setting: str, numbers: list[int]) -> int:
    if len(numbers) != 1:
        text = ",".join(map(str, numbers))
        raise ConfigError(f"{setting}={text} is a list, which only --learning compares; give one number.")
    return numbers[0]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None


PROFILE = ("measure, simulate and compare memory", profile)
PLAN = ("find the settings that fit a GPU", plan)
INIT = ("write a project folder with settings that fit a GPU", init)
"""(one line of help, function) of each command, as the entry points name them."""
