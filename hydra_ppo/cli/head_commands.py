"""The parsers of the commands around reward heads: features, heads, label-next, self-label, reward-eval."""

from __future__ import annotations

import argparse

from hydra_ppo.cli.parser import (
    RUN_SETTINGS,
    Parser,
    add_quantization,
    check_folder,
    check_run,
    positive,
    quantization_flags,
    split_settings,
)
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError

KINDS = ("linear", "mlp", "one-pass")


def features(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo features`, and do it."""
    flags, rest = split_settings(arguments)
    parser = Parser("features", "Store the states that reward heads read, of both answers of every pair." + RUN_SETTINGS)
    _add_run(parser)
    parser.add_argument("data", metavar="DATA", help="File or hub dataset of pairs, or of prompts with two responses.")
    parser.add_argument("--output", type=local_path, required=True, metavar="DIR", help="Folder to write to, or to go on with.")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="Most texts of one pass.")
    parser.add_argument("--mean", action="store_true", help="Store the mean state of each answer's tokens, too.")
    add_quantization(parser)
    options = parser.parse_args(rest)
    check_run(options.run)
    check_folder("output", options.output)
    from hydra_ppo.cli.features import features

    flags = [*quantization_flags(options.quantization), *flags]
    features(options.run, options.data, options.output, flags=flags, rows=options.batch_size, means=options.mean)


def heads(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo heads`, and do it."""
    parser = Parser("heads", "Train reward heads on stored states; reward.sources: [{kind: head, target: HEADS}] reads them.")
    parser.add_argument("features", metavar="DIR", type=local_path, help="Folder that hydra-ppo features wrote.")
    parser.add_argument("--output", type=local_path, required=True, metavar="HEADS", help="Folder to write to.")
    _add_training(parser)
    parser.add_argument("--held-out", type=share, default=0.1, metavar="S", help="Share of the pairs that is held out.")
    options = parser.parse_args(arguments)
    check_folder("output", options.output)
    _check_training(parser, options, arguments)
    from hydra_ppo.cli.heads import heads

    heads(options.features, options.output, _training(options), options.held_out)


def label_next(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo label-next`, and do it."""
    flags, rest = split_settings(arguments)
    parser = Parser("label-next", "Say which pairs without a label teach a one-pass head most." + RUN_SETTINGS)
    parser.add_argument("source", metavar="DIR|DATA", help="Folder of features, or prompts with two responses and --run.")
    parser.add_argument("--head", type=local_path, required=True, metavar="HEADS", help="Of hydra-ppo heads --kind one-pass.")
    parser.add_argument("--count", type=positive, default=100, metavar="N", help="Pairs to name.")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="Write them as JSONL, the first to label first.")
    parser.add_argument("--run", type=local_path, metavar="RUN", help="Run whose states are read, where DATA are texts.")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="Most texts of one pass.")
    options = parser.parse_args(rest)
    if options.run is not None:
        check_run(options.run)
    from hydra_ppo.cli.label_next import label_next

    label_next(
        options.source,
        options.head,
        options.count,
        output=options.output,
        run=options.run,
        flags=flags,
        rows=options.batch_size,
    )


def self_label(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo self-label`, and do it."""
    parser = Parser("self-label", "Label pairs with heads that were trained on labels, in rounds that a held-out share judges.")
    parser.add_argument("features", metavar="DIR", type=local_path, help="Folder that hydra-ppo features wrote.")
    parser.add_argument("--output", type=local_path, required=True, metavar="OUT", help="Folder for pairs.jsonl and heads.")
    parser.add_argument("--labelled", type=share, metavar="S", help="Share of labels to begin with; the others are hidden.")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="Most rounds.")
    _add_training(parser, kind="linear", kinds=("linear", "mlp"))
    parser.add_argument("--held-out", type=share, default=0.2, metavar="S", help="Share of the labels that judges rounds.")
    options = parser.parse_args(arguments)
    check_folder("output", options.output)
    _check_training(parser, options, arguments)
    from hydra_ppo.cli.self_label import self_label

    self_label(
        options.features,
        options.output,
        _training(options),
        held_out=options.held_out,
        labelled=options.labelled,
        rounds=options.rounds,
    )


def reward_eval(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo reward-eval`, and do it."""
    flags, rest = split_settings(arguments)
    parser = Parser("reward-eval", "Say how far the reward head of a run can be believed, on pairs." + RUN_SETTINGS)
    _add_run(parser)
    parser.add_argument("data", metavar="DATA", help="File or hub dataset of preference pairs.")
    parser.add_argument("--heads", type=local_path, metavar="HEADS", help="Judge these heads in place of the run's own.")
    parser.add_argument("--judge", metavar="MODULE:FUNCTION", help="Independent judge, a reward function.")
    parser.add_argument("--best-of", type=whole, default=16, metavar="N", help="Answers to each prompt; 0 samples none.")
    parser.add_argument("--prompts", type=positive, default=200, metavar="N", help="Most prompts to sample.")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="Longest answer; default as the run's.")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="Seed of samples and clusters.")
    parser.add_argument("--clusters", type=whole, default=8, metavar="N", help="Clusters of mean states; 0 makes none.")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="Most texts of one pass.")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="Write the numbers as JSON.")
    add_quantization(parser)
    options = parser.parse_args(rest)
    check_run(options.run)
    if options.best_of == 1:
        raise ConfigError("--best-of 1 compares an answer with itself; choose 2 or more, or 0 to sample none.")
    if options.judge is not None and options.best_of == 0:
        raise ConfigError("--judge judges sampled answers, and --best-of 0 samples none; leave one of them out.")
    from hydra_ppo.cli.reward_eval import Sampled, reward_eval

    sampled = Sampled(options.best_of, options.prompts, options.max_new_tokens, options.seed)
    reward_eval(
        options.run,
        options.data,
        heads=options.heads,
        judge=options.judge,
        sampled=sampled,
        clusters=options.clusters,
        output=options.output,
        flags=[*quantization_flags(options.quantization), *flags],
        rows=options.batch_size,
    )


def whole(text: str) -> int:
    """Read a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def share(text: str) -> float:
    """Read a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def rate(text: str) -> float:
    """Read a learning rate."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=local_path, help="Run folder of ppo or sft, or a checkpoint.")


def _add_training(parser: Parser, kind: str = "mlp", kinds: tuple[str, ...] = KINDS) -> None:
    parser.add_argument("--kind", choices=kinds, default=kind, help=f"What a head is; default {kind}.")
    parser.add_argument("--members", type=positive, metavar="K", help="Heads, each of 80%% of the pairs; default 5.")
    parser.add_argument("--hidden", type=positive, nargs="+", default=[1024, 512], metavar="N", help="Widths of an mlp.")
    parser.add_argument(
        "--epochs", type=positive, default=30, metavar="N", help="Of an mlp, most passes over the pairs, 300 steps at least."
    )
    parser.add_argument("--batch-size", type=positive, default=512, metavar="N", help="Of an mlp, pairs of a step.")
    parser.add_argument("--learning-rate", type=rate, default=1e-3, metavar="R", help="Of an mlp, Adam's.")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="Seed of everything that is drawn.")


def _check_training(parser: Parser, options: argparse.Namespace, arguments: list[str]) -> None:
    """Refuse options that a kind of head would pass over."""
    given = {argument.split("=")[0] for argument in arguments}
    for name in ("--hidden", "--epochs", "--batch-size", "--learning-rate"):
        if name in given and options.kind != "mlp":
            raise ConfigError(f"{name} does not go with --kind {options.kind}; leave it out.")
    if options.kind == "one-pass" and options.members not in (None, 1):
        raise ConfigError(f"--members {options.members} does not go with --kind one-pass, which is one head; leave it out.")


def _training(options: argparse.Namespace):  # type: ignore[no-untyped-def]  # its type would import torch
    from hydra_ppo.rewards.head_training import HeadTraining

    return HeadTraining(
        kind=options.kind,
        members=1 if options.kind == "one-pass" else options.members or 5,
        hidden=tuple(options.hidden),
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
