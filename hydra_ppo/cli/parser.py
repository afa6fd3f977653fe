"""The parser of a command, and checks of what it was given."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import NoReturn

from hydra_ppo.errors import ConfigError

RUN_SETTINGS = " --data.NAME VALUE and --model.NAME VALUE change the run's own settings, which hydra-ppo sft --help lists."


def check_run(run: Path) -> None:
    if not run.is_dir():
        raise ConfigError(f"{run} is not a folder; name a run folder of ppo or sft.")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def check_folder(setting: str, path: Path) -> None:
    """Refuse a file, and what would lie below one, as a folder to write to.

    Raises:
        ConfigError: naming the file that stands in the way.
    """
    try:
        obstacle = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except OSError as error:
        raise ConfigError(f"{setting}={str(path)!r} cannot be made ({error.strerror}); choose another folder.") from None
    if obstacle is not None:
        why = "is a file" if obstacle == path else f"cannot be made, {obstacle} is a file"
        raise ConfigError(f"{setting}={str(path)!r} {why}; choose a folder.")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a ConfigError with the nearest option."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"hydra-ppo {command}", description=description, allow_abbrev=False)
        self.add_argument("--traceback", action="store_true", help="Show where an error arose.")

    def parse_args(self, arguments: list[str]) -> argparse.Namespace:  # type: ignore[override]  # takes no namespace
        known = [option for action in self._actions for option in action.option_strings]
        for argument in arguments:
            option = argument.split("=", 1)[0]
            if option.startswith("-") and not option[1:].isdecimal() and option not in known:
                guess = difflib.get_close_matches(option, known, n=1)
                if Path(argument).exists():
                    raise ConfigError(f"{argument} is read as an option, for it begins with -; write ./{argument}.")
                raise ConfigError(
                    f"{option} is not an option; "
                    + (f"did you mean {guess[0]}?" if guess else f"{self.prog} --help lists all options.")
                )
        return super().parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help shows the usage.")


def split_settings(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split off the settings of the run that a command changes: `--data.NAME VALUE`, `--model.NAME=VALUE`."""
    flags: list[str] = []
    rest = list(arguments)
    others: list[str] = []
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(("--data.", "--model.")):
            others.append(argument)
            continue
        flags.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return flags, others


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Let a command read the run on a base that is held in another way."""
    held = ("none", "int8", "nf4", "fp4")
    parser.add_argument("--quantization", choices=held, help="How the base is held; default as the run held it.")


def quantization_flags(wanted: str | None) -> list[str]:
    """Return the setting that `--quantization` stands for."""
    return [] if wanted is None else ["--model.quantization", "null" if wanted == "none" else wanted]
