"""Parse the settings of a command: an optional YAML file, then flags, which win.

jsonargparse turns the dataclasses into flags, checks types and writes ``--help``; this module reads the YAML
itself, so that every mistake gets one line with the full name of the setting.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser

from hydra_ppo.config.paths import is_run_config, read_settings
from hydra_ppo.config.reading import (
    Setting,
    as_values,
    build,
    check_items,
    choices,
    describe,
    flatten,
    is_mapping,
    item_class,
    nearest,
    nest,
    settings_of,
    unknown_setting,
)
from hydra_ppo.config.writing import render_yaml
from hydra_ppo.errors import ConfigError

Config = TypeVar("Config")

OPTIONS = {
    "--help": "Show this text and stop.",
    "--print-config": "Write the full configuration as YAML, with each setting's help, and stop.",
    "--dry-run": "Check settings, files and output folder, show the batch arithmetic, load no weights and stop.",
    "--resume": "Go on with the run in run.output from its newest checkpoint; begin where there is none.",
    "--traceback": "Show where an error arose.",
}
UNSET = "???"


@dataclass(frozen=True)
class Request(Generic[Config]):
    """What a command line asks for: a built config, or the options that need none."""

    config: Config | None
    values: dict[str, Any] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    path: Path | None = None

    def check_place(self, output: str) -> None:
        """Refuse to go on by the config of a run that was moved, which names the place where the run was.

        Raises:
            ConfigError: naming both places; configs that name paths from where they lie are never refused.
        """
        if self.path is None or "--resume" not in self.options or not is_run_config(self.path):
            return
        here = self.path.parent
        if Path(output).resolve() != here.resolve():
            raise ConfigError(
                f"run.output={output!r} is where the run of {str(self.path)!r} was before it was moved; pass --run.output "
                f"{here} to go on with it where it is."
            )


def make_parser(config_class: type, command: str) -> ArgumentParser:
    """Build the jsonargparse parser of ``config_class``; every flag carries the help of its field."""
    parser = ArgumentParser(
        prog=f"hydra-ppo {command}",
        usage=f"hydra-ppo {command} [CONFIG.yaml] [--SETTING VALUE ...]",
        description=(config_class.__doc__ or "").split("\n")[0]
        + " CONFIG.yaml holds any of the settings below, nested at the dots; flags win over it.",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    group = parser.add_argument_group("options")
    for option, text in OPTIONS.items():
        group.add_argument(
            *(["-h", option] if option == "--help" else [option]), action="store_true", default=SUPPRESS, help=text
        )
    parser.add_class_arguments(config_class)
    known = settings_of(config_class)
    for action in parser._actions:
        if action.dest in known:
            action.help = known[action.dest].help.replace("%", "%%")
        elif action.dest not in {option.lstrip("-").replace("-", "_") for option in OPTIONS}:
            # `--model FILE`, `--reward.sources.help`: second ways of saying what YAML and full names say.
            action.help = SUPPRESS
    return parser


def format_help(config_class: type, command: str) -> str:
    """Return the ``--help`` text: every setting with its help, type and default."""
    return make_parser(config_class, command).format_help()


def parse(
    config_class: type[Config], command: str, argv: Sequence[str], content: Mapping[str, Any] | None = None
) -> Request[Config]:
    """Parse ``argv`` (after the command) into a config; ``content`` are settings in place of a file that ``argv`` names.

    With ``--help`` nothing is checked; with ``--print-config`` required settings may be missing.

    Raises:
        ConfigError: One line that names the setting, what is wrong and what to do.
    """
    known = settings_of(config_class)
    path, options, flags = _split(config_class, known, argv)
    if "--help" in options:
        return Request(None, options=options)
    content = read_settings(path) if path is not None else content
    flat = flatten(content, config_class) if content is not None else {}
    flat = {name: value for name, value in flat.items() if value is not None or not known[name].required}
    written = deepcopy(flat)  # jsonargparse changes what it is given
    parser = make_parser(config_class, command)
    _parse_object(parser, known, flat)
    # jsonargparse fills a list's items from those at the same place of its default, but a flag replaces the file's list.
    replaced = {name for name, _ in flags if name in flat and item_class(known[name].hint) is not None}
    defaults = {name: value for name, value in flat.items() if name not in replaced}
    parser.set_defaults({name: UNSET for name, setting in known.items() if setting.required} | defaults)
    try:
        namespace = parser.parse_args([f"--{name}={value}" for name, value in flags])
    except ArgumentError as error:
        raise _explain(error, known, _flag_values(known, flags)) from None
    given = set(flat) | {name.rstrip("+") for name, _ in flags}
    missing = [name for name, setting in known.items() if setting.required and name not in given]
    if missing and "--print-config" not in options:
        names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
        have, them = ("have", "them") if len(missing) > 1 else ("has", "it")
        raise ConfigError(f"{names} {have} no value; set {them} in the YAML file or by flag, for example --{missing[0]} VALUE.")
    config = build(config_class, _with_mappings(namespace.as_dict(), known, written, flags))
    values = as_values(config)
    for name in missing:
        parents, _, leaf = name.rpartition(".")
        node = values
        for parent in parents.split("."):
            node = node[parent]
        del node[leaf]
    return Request(None if missing else config, values, options, None if path is None else Path(path))


def print_config(config_class: type, request: Request[Any]) -> str:
    """Return the full configuration of ``request`` as commented YAML."""
    return render_yaml(config_class, request.values)


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """Load a complete config from a YAML file, such as the ``config.yaml`` of a run folder."""
    request = parse(config_class, "", [str(path)])
    assert request.config is not None  # only --help and --print-config leave it out
    return request.config


def _with_mappings(
    values: dict[str, Any], known: Mapping[str, Setting], written: Mapping[str, Any], flags: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Put settings that are mappings in as they were written: jsonargparse reads the texts in them once more, 'no' as false."""
    given = dict(written)
    for name, text in flags:
        if name in known and is_mapping(known[name].hint):
            with suppress(yaml.YAMLError):  # then jsonargparse read it in a way of its own
                given[name] = yaml.safe_load(text)
    for name, value in given.items():
        if is_mapping(known[name].hint) and isinstance(value, dict):
            *parents, leaf = name.split(".")
            node = values
            for parent in parents:
                node = node[parent]
            node[leaf] = value
    return values


def _split(
    config_class: type, known: Mapping[str, Setting], argv: Sequence[str]
) -> tuple[str | None, frozenset[str], list[tuple[str, str]]]:
    """Split ``argv`` into the YAML path, the options and the (name, value) flags, refusing unknown names."""
    path: str | None = None
    options: set[str] = set()
    flags: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token in OPTIONS or token == "-h":
            options.add("--help" if token == "-h" else token)
        elif token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            setting = known.get(name.removesuffix("+"))
            if setting is None:
                if option := difflib.get_close_matches(token, OPTIONS, n=1, cutoff=0.85):
                    raise ConfigError(f"{token} is not an option; did you mean {option[0]}?")
                raise unknown_setting(name, config_class)
            if not equals:
                is_value = bool(rest) and not rest[0].startswith("--")
                if setting.hint is bool and (not is_value or rest[0].endswith((".yaml", ".yml"))):
                    value = "true"  # `--run.overwrite` alone switches it on
                elif is_value:
                    value = rest.pop(0)
                else:
                    raise ConfigError(f"--{name} has no value; give {describe(setting.hint)}.")
            flags.append((name, value))
        elif token.startswith("-") and Path(token).exists():
            raise ConfigError(f"{token} is read as an option, for it begins with -; write ./{token}.")
        elif token.startswith("-"):
            raise ConfigError(f"{token} is not an option; write settings in full, for example --run.seed 1.")
        elif path is None:
            path = token
        else:
            raise ConfigError(f"{token!r} is one argument too many; give one YAML file, then --SETTING VALUE flags.")
    return path, frozenset(options), flags


def _parse_object(parser: ArgumentParser, known: Mapping[str, Setting], flat: Mapping[str, Any]) -> None:
    """Check the types of the YAML's values."""
    for name, value in flat.items():
        if is_bare_choice(known[name].hint, value):
            # YAML 1.1 reads a bare word such as `no` as a boolean; say so instead of naming the type.
            raise ConfigError(f"{name}={value!r} is not {describe(known[name].hint)}; put the word in quotes.")
    complete = {name: UNSET for name, setting in known.items() if setting.required} | dict(flat)
    try:
        parser.parse_object(nest(complete))
    except ArgumentError as error:
        raise _explain(error, known, flat) from None


def is_bare_choice(hint: Any, value: Any) -> bool:
    """Say whether a boolean stands where one of several words belongs."""
    return isinstance(value, bool) and bool(choices(hint)) and bool not in get_args(hint)


def _flag_values(known: Mapping[str, Setting], flags: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the flags' values as the user wrote them; lists of dataclasses are read and their keys checked."""
    values: dict[str, Any] = {}
    for name, text in flags:
        name = name.removesuffix("+")
        values[name] = text
        if item_class(known[name].hint) is not None:
            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError:
                continue
            values[name] = content if isinstance(content, list) else [content] if isinstance(content, dict) else text
            check_items(name, known[name].hint, values[name])
    return values


def _explain(error: ArgumentError, known: Mapping[str, Setting], values: Mapping[str, Any]) -> ConfigError:
    """Turn jsonargparse's message into ours: the full name, the value, what it must be, what to write."""
    message = str(error)
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys or keys[0] not in known or keys[0] not in values:
        return ConfigError(" ".join(message.split()))
    name, setting = keys[0], known[keys[0]]
    hint, value, default = setting.hint, values[name], setting.default
    inner = item_class(hint)
    if inner is not None and isinstance(value, list):
        hints = get_type_hints(inner)
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                return ConfigError(f"{name}[{index}]={item!r} is not a group of settings; {_write(hint, default)}.")
            for key in keys[1:]:
                if key in item and f"Got value: {item[key]}" in message.replace("Given value:", "Got value:"):
                    return _type_error(f"{name}[{index}].{key}", hints[key], item[key], None)
    return _type_error(name, hint, value, default)


def _type_error(name: str, hint: Any, value: Any, default: Any) -> ConfigError:
    words = choices(hint)
    kinds = get_args(hint) or (hint,)
    if isinstance(value, list) and str in kinds and not any(get_origin(kind) is list for kind in (hint, *kinds)):
        remedy = "put all rows into one file" if name.startswith("data.") else "name one"
        return ConfigError(f"{name}={value!r} is a list, and takes one; {remedy}.")
    guess = nearest(str(value).strip("[]'\" "), words) if words else None
    takes_list = get_origin(hint) is list or bool in kinds
    if guess is not None and takes_list and not isinstance(value, list) and str(value) in words:
        guess = None  # the right word, but not in a list
    remedy = f"did you mean {guess}?" if guess else f"{_write(hint, default)}."
    return ConfigError(f"{name}={value!r} is not {describe(hint)}; {remedy}")


def _write(hint: Any, default: Any) -> str:
    """Say what to write instead, with the default as the example where it shows the form."""
    if (words := choices(hint)) and bool in get_args(hint):
        return f"write true, false, or for example [{words[0]}]"
    if words and get_origin(hint) is list:
        return f"write for example [{words[0]}]"
    if (inner := item_class(hint)) is not None:
        return "write for example [{kind: head}]" if fields(inner)[0].name == "kind" else "write a list"
    if words:
        return f"choose one, for example {words[0]}"
    if is_mapping(hint):
        return "write for example {name: value}"
    plain = set(get_args(hint) or (hint,))
    if bool in plain:
        return "write true or false"
    if str in plain:
        return "put it in quotes"
    if isinstance(default, int | float) and not isinstance(default, bool):
        return f"write a number, for example {default}"
    return f"write {'a whole number' if int in plain else 'a number'}, for example {1 if int in plain else 0.1}"
