"""The command line: ``hydra-ppo sft | ppo | export | score | generate | ...``, all in `COMMANDS`, and what is installed beside
it.

Other packages add commands as entry points of the group ``hydra_ppo.commands``: each a pair of one line of help and a
function over the arguments.

Exit codes: 0 done (or stopped by a signal, with everything saved), 1 a run failed, 2 bad input, 130 interrupted. Errors are one
line on stderr.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_ppo import __version__
from hydra_ppo.cli import head_commands
from hydra_ppo.cli.parser import (
    RUN_SETTINGS,
    Parser,
    add_quantization,
    check_folder,
    check_run,
    port,
    positive,
    quantization_flags,
    split_settings,
    temperature,
)
from hydra_ppo.cli.rlhf import RLHF
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError, DataError, HydraError, UnsupportedModelError
from hydra_ppo.parallel.environment import check_alone, place, speaks
from hydra_ppo.runs.contents import REPORT
from hydra_ppo.runtime.interruption import StopRequested, stopping_at_once, stopping_on_signals
from hydra_ppo.runtime.output import finish, losing_output, settle_output, without_input

if TYPE_CHECKING:
    from hydra_ppo.config.settings import PPOConfig, SFTConfig

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
SHARED = ("sft", "ppo")  # commands that several processes do together

SAMPLED_ROLES = ("actor", "actor_ema", "reference", "base")


Command = tuple[str, Callable[[list[str]], int | None]]
"""One line of help, and what runs it; an exit code, where it is not 0."""


class _Stderr(logging.Handler):
    """Prints log lines to whatever stderr is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def set_up_output() -> None:
    """Show this program's own log lines, and keep other libraries' progress bars and notices out of the output.

    The latter through the environment where possible, so that it holds without importing them.
    """
    own = logging.getLogger("hydra_ppo")
    own.setLevel(logging.INFO if speaks(0) else logging.ERROR)  # what several processes find, one says
    if not own.handlers:
        own.addHandler(_Stderr())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its retries to meet other processes; what fails is an error
    # bitsandbytes looks for an optional kernel package, PEFT asks transformers a question that was renamed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: Arguments after the program's name; None takes them from ``sys.argv``.
    """
    set_up_output()
    settle_output()
    code = _run(argv)
    lost = finish(sys.stdout)
    finish(sys.stderr)
    if lost is None or isinstance(lost, BrokenPipeError) or code != DONE:
        return code
    return _complain(lost, FAILED, f"standard output cannot be written ({lost.strerror}); nothing else is wrong.", False)


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or os.environ.get("HYDRA_TRACEBACK", "") not in ("", "0")
    try:
        with without_input():
            return _dispatch(arguments)
    except SystemExit as stop:  # argparse, after it has printed its help
        return int(stop.code or DONE)
    except (ConfigError, DataError, UnsupportedModelError) as error:
        return _complain(error, BAD_INPUT, str(error), show_traceback)
    except HydraError as error:
        return _complain(error, FAILED, str(error), show_traceback)
    except StopRequested:
        return DONE
    except KeyboardInterrupt as error:
        return _complain(error, INTERRUPTED, "interrupted", show_traceback)
    except BrokenPipeError:
        return DONE  # whoever read standard output has gone (`| head`)
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "" if show_traceback else " (--traceback shows where)"
        return _complain(error, FAILED, what + hint, show_traceback)


def _complain(error: BaseException, code: int, text: str, show_traceback: bool) -> int:
    if not speaks(getattr(error, "said_by", None)):
        return code
    with suppress(OSError):  # a terminal that is gone
        if show_traceback:
            traceback.print_exception(error)
        print(" ".join(text.split()), file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    commands = _commands()
    if not arguments:
        raise ConfigError(f"no command given; choose one of {', '.join(commands)}, or --help.")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(_overview(commands))
    elif name in ("-V", "--version"):
        print(f"hydra-ppo {__version__}")
    elif name in commands:
        if name not in SHARED:
            check_alone(f"hydra-ppo {name}")
        return _command(commands[name])[1](rest) or DONE
    else:
        guess = difflib.get_close_matches(name, commands, n=1)
        raise ConfigError(
            f"{name} is not a command; " + (f"did you mean {guess[0]}?" if guess else f"choose one of {', '.join(commands)}.")
        )
    return DONE


def _commands() -> dict[str, Command | EntryPoint]:
    """Return all commands, also those that other packages add."""
    return {**COMMANDS, **{entry.name: entry for entry in entry_points(group="hydra_ppo.commands")}}


def _command(found: Command | EntryPoint) -> Command:
    return found.load() if isinstance(found, EntryPoint) else found


def _overview(commands: Mapping[str, Command | EntryPoint]) -> str:
    lines = ["usage: hydra-ppo COMMAND ...", "", "PPO-based RLHF with four roles on one shared base.", ""]
    lines += [f"  {name:<12}{_command(found)[0]}" for name, found in commands.items()]
    return "\n".join([*lines, "", "hydra-ppo COMMAND --help lists all settings of a command."])


def _sft(arguments: list[str]) -> None:
    from hydra_ppo.config.settings import SFTConfig

    _train("sft", SFTConfig, arguments)


def _ppo(arguments: list[str]) -> None:
    from hydra_ppo.config.settings import PPOConfig

    _train("ppo", PPOConfig, arguments)


def _train(command: str, config_class: type[SFTConfig | PPOConfig], arguments: list[str]) -> None:
    from hydra_ppo.cli import flags as cli_config

    request = cli_config.parse(config_class, command, arguments)
    shown = {"--help", "--print-config", "--dry-run"}.intersection(request.options) or request.config is None
    if shown and not place().is_main:
        return  # rank 0 shows it
    if "--help" in request.options:
        print(cli_config.format_help(config_class, command), end="")
    elif "--print-config" in request.options or request.config is None:
        print(cli_config.print_config(config_class, request), end="")
    elif "--dry-run" in request.options:
        from hydra_ppo.cli.dry_run import dry_run

        request.check_place(request.config.run.output)
        dry_run(request.config, resume="--resume" in request.options)
    else:
        from hydra_ppo.cli import commands
        from hydra_ppo.cli.dry_run import check_files

        request.check_place(request.config.run.output)
        with losing_output(), stopping_on_signals():
            try:
                # One of several that stopped here would leave the others waiting for it: they stop once they have met.
                with stopping_at_once() if place().size == 1 else nullcontext():
                    check_files(request.config)
            except StopRequested:
                print("Stopped; nothing was begun.")
                raise
            getattr(commands, command)(request.config, resume="--resume" in request.options)


def _export(arguments: list[str]) -> None:
    from hydra_ppo.cli.choices import EXPORTED_ROLES, EXPORTED_TYPES

    parser = Parser("export", "Write a run's actor as a plain Hugging Face model, or its reward or critic as a classifier.")
    parser.add_argument("run", metavar="RUN", type=local_path, help="Run folder of ppo or sft, or a checkpoint.")
    parser.add_argument("--output", type=local_path, required=True, metavar="DIR", help="Folder to write to.")
    parser.add_argument(
        "--role", choices=EXPORTED_ROLES, default="actor", help="actor, actor_ema: causal LMs; others: sequence classifiers."
    )
    parser.add_argument("--adapter-only", action="store_true", help="Write the PEFT adapter alone, without the base.")
    parser.add_argument(
        "--dtype",
        choices=EXPORTED_TYPES,
        default="auto",
        help="Type of the weights; auto is the base's own for the actor and fp32 for classifiers, whose scores stay the same.",
    )
    options = parser.parse_args(arguments)
    check_run(options.run)
    check_folder("output", options.output)
    from hydra_ppo.cli import commands

    commands.export(options.run, options.output, options.role, options.adapter_only, options.dtype)


def _quantize(arguments: list[str]) -> None:
    from hydra_ppo.cli.choices import EXPORTED_TYPES, QUANTIZATIONS

    parser = Parser("quantize", "Write a base with quantised linear layers into a folder of its own, which loads in seconds.")
    parser.add_argument("model", metavar="MODEL", help="Model folder or hub name, not quantised.")
    parser.add_argument("--output", type=local_path, required=True, metavar="DIR", help="Folder to write to.")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="nf4", help="How linear layers are held.")
    parser.add_argument("--dtype", choices=EXPORTED_TYPES, default="auto", help="Type of all else; auto is the stored one.")
    parser.add_argument("--device", default="auto", metavar="D", help="Where it is quantised: auto, cpu, cuda or cuda:N.")
    options = parser.parse_args(arguments)
    check_folder("output", options.output)
    from hydra_ppo.cli.quantize import quantize_model

    kinds = {"quantization": options.quantization, "dtype": options.dtype, "device": options.device}
    for note in quantize_model(options.model, options.output, **kinds):
        print(note)


def _score(arguments: list[str]) -> None:
    flags, rest = split_settings(arguments)
    parser = Parser("score", "Score preference pairs, or prompts with responses, with the reward head of a run." + RUN_SETTINGS)
    parser.add_argument("run", metavar="RUN", type=local_path, help="Run folder of ppo or sft, or a checkpoint.")
    parser.add_argument("data", metavar="DATA", help="File or hub dataset: pairs, or rows of prompt and response(s).")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="Write scores as JSONL, a line for each row.")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="Most texts of one pass.")
    add_quantization(parser)
    options = parser.parse_args(rest)
    check_run(options.run)
    from hydra_ppo.cli.score import score

    flags = [*quantization_flags(options.quantization), *flags]
    score(options.run, options.data, options.output, flags=flags, rows=options.batch_size)


def _generate(arguments: list[str]) -> None:
    flags, rest = split_settings(arguments)
    parser = Parser("generate", "Sample answers to prompts from the roles of a run." + RUN_SETTINGS)
    parser.add_argument("run", metavar="RUN", type=local_path, help="Run folder of ppo or sft, or a checkpoint.")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", metavar="FILE", help="File or hub dataset of prompts, or of preference pairs.")
    prompts.add_argument("--prompt", metavar="TEXT", help="One prompt; a user's message where there is a chat template.")
    parser.add_argument("--plain", action="store_true", help="Let --prompt be plain text, also where there is a chat template.")
    parser.add_argument("--role", choices=SAMPLED_ROLES, default="actor", help="Whose answers; base is without any adapter.")
    parser.add_argument("--both", action="store_true", help="Answers of base and actor, side by side.")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="Longest answer; default as the run's.")
    parser.add_argument("--temperature", type=temperature, metavar="T", help="0 takes the likeliest; default as the run's.")
    parser.add_argument("--samples", type=positive, default=1, metavar="N", help="Answers to each prompt.")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="Seed of the samples.")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="Answers that are decoded together.")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="Write JSONL, a line for each prompt and sample.")
    add_quantization(parser)
    options = parser.parse_args(rest)
    check_run(options.run)
    if options.both and options.role != "actor":
        raise ConfigError(f"--both samples base and actor, --role {options.role} asks for another; leave one out.")
    from hydra_ppo.cli.generate import Sampling, generate

    generate(
        options.run,
        prompts=options.prompts,
        question=options.prompt,
        plain=options.plain,
        roles=["base", "actor"] if options.both else [options.role],
        sampling=Sampling(options.max_new_tokens, options.temperature, options.samples, options.seed, options.batch_size),
        output=options.output,
        flags=[*quantization_flags(options.quantization), *flags],
    )


def _inspect(arguments: list[str]) -> None:
    parser = Parser("inspect", "Show state, settings, last metrics and checkpoints of a run.")
    parser.add_argument("run", metavar="RUN", type=local_path, help="Run folder.")
    parser.add_argument("--json", action="store_true", help="Write JSON; null stands for what was not measured.")
    options = parser.parse_args(arguments)
    from hydra_ppo.cli import commands

    commands.inspect(options.run, options.json)


def _report(arguments: list[str]) -> None:
    parser = Parser("report", "Write the page of a run, or of several over one another: one HTML file, or served on loopback.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=local_path, help="Run folder of sft or ppo.")
    parser.add_argument(
        "--output",
        type=local_path,
        metavar="FILE",
        help="File to write; default report.html in the run folder, of several here.",
    )
    parser.add_argument(
        "--live", type=port, metavar="PORT", help="Serve the page on 127.0.0.1, renewing itself; 0 takes a free port."
    )
    options = parser.parse_args(arguments)
    if options.live is not None:
        if options.output is not None:
            raise ConfigError("--live serves the page and --output writes it; leave one out.")
        from hydra_ppo.report.live import serve

        serve(options.runs, options.live, lambda line: print(line, flush=True))
        return
    from hydra_ppo.report.page import write_report

    several = len(options.runs) > 1
    print(f"Page: {write_report(options.runs, options.output or (Path() if several else options.runs[0]) / REPORT)}")


def _compare(arguments: list[str]) -> None:
    from hydra_ppo.cli.compare import compare

    compare(arguments)


def _completion(arguments: list[str]) -> None:
    from hydra_ppo.cli.completion import completion

    completion(arguments, {name: _command(found)[1] for name, found in _commands().items()})


def _push(arguments: list[str]) -> None:
    from hydra_ppo.cli.push import push

    push(arguments)


def _doctor(arguments: list[str]) -> int:
    parser = Parser("doctor", "Say what this machine offers and what stands in the way; exit code 1 where something does.")
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.add_argument(
        "--model", metavar="NAME", help="Look at this model too (folder, hub name or run); no weights are read."
    )
    options = parser.parse_args(arguments)
    from hydra_ppo.cli.doctor import doctor

    return doctor(as_json=options.json, model=options.model)


def _launch(arguments: list[str]) -> int:
    from hydra_ppo.cli.launch import launch

    return launch(arguments)


COMMANDS: dict[str, Command] = {
    "sft": ("train the SFT model and the reward model jointly, on preference pairs", _sft),
    "ppo": ("train actor and critic with PPO", _ppo),
    "rlhf": RLHF,
    "export": ("write a role of a run as a plain Hugging Face model", _export),
    "push": ("push a role of a run to the hub, with a card", _push),
    "quantize": ("write a base quantised, once, so that runs load it in seconds", _quantize),
    "score": ("score pairs or responses with the reward head of a run", _score),
    "generate": ("sample answers from the roles of a run, side by side", _generate),
    "features": ("store the states that reward heads read, of every pair, once", head_commands.features),
    "heads": ("train reward heads on stored states, on a CPU", head_commands.heads),
    "label-next": ("say which pairs to label next", head_commands.label_next),
    "self-label": ("label pairs with heads that were trained on labels, in rounds", head_commands.self_label),
    "reward-eval": ("say how far the reward head of a run can be believed", head_commands.reward_eval),
    "doctor": ("say what this machine offers and what stands in the way", _doctor),
    "launch": ("start sft or ppo on several GPUs, of this machine or of a Ray cluster", _launch),
    "report": ("write the page of a run, or of several over one another; --live serves it", _report),
    "compare": ("show in which settings runs differ, and what came of each", _compare),
    "inspect": ("show state, settings, last metrics and checkpoints of a run", _inspect),
    "completion": ("print what a shell completes, for bash, zsh or fish", _completion),
}
