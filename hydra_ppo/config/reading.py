"""Read and build settings: full names, YAML, one-line errors.

A setting has a full name such as ``model.lora.r``; YAML nests it, flags spell it out. Everything here is
driven by the dataclasses, so that a new field needs no second mention.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hydra_ppo.config.elsewhere import called_here
from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")


@dataclass(frozen=True)
class Setting:
    """One leaf of a config: its full name, type hint, default (``MISSING`` where required) and help."""

    name: str
    hint: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is MISSING


def is_group(hint: Any) -> TypeGuard[type[DataclassInstance]]:
    """Say whether ``hint`` is a dataclass, whose fields are settings of their own."""
    return isinstance(hint, type) and is_dataclass(hint)


def settings_of(config_class: type) -> dict[str, Setting]:
    """Return every leaf setting of ``config_class`` by full name, in the order of the dataclasses."""
    return {setting.name: setting for setting in _walk(config_class, "", None)}


def groups_of(config_class: type) -> dict[str, str]:
    """Return the full name of every group (nested dataclass) with its one-line description."""
    found: dict[str, str] = {}
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        if is_group(hint):
            found[field.name] = field.metadata.get("help") or (hint.__doc__ or "").split("\n")[0]
            found |= {f"{field.name}.{inner}": text for inner, text in groups_of(hint).items()}
    return found


def _walk(config_class: type, prefix: str, defaults: Any) -> Iterator[Setting]:
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        if defaults is not None:
            default = getattr(defaults, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        else:
            default = field.default
        name, hint = prefix + field.name, hints[field.name]
        if is_group(hint):
            yield from _walk(hint, f"{name}.", None if default is MISSING else default)
        else:
            yield Setting(name, hint, default, field.metadata.get("help", ""))


def item_class(hint: Any) -> type[DataclassInstance] | None:
    """Return the dataclass ``X`` of a ``list[X]`` hint, else None."""
    arguments = get_args(hint)
    return arguments[0] if get_origin(hint) is list and is_group(arguments[0]) else None


def is_mapping(hint: Any) -> bool:
    """Say whether a setting holds a mapping, whose keys are the user's own."""
    return get_origin(hint) is dict


def describe(hint: Any) -> str:
    """Say in words what a value must be: ``a float``, ``one of k1 or k3``, ``an integer or null``."""
    names = {float: "a float", int: "an integer", bool: "true or false", str: "a string", NoneType: "null"}
    if hint in names:
        return names[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + _either([str(a) for a in arguments])
    if origin in (Union, UnionType):
        if get_origin(arguments[0]) is Literal:
            return "one of " + _either([str(a) for a in get_args(arguments[0])] + [describe(a) for a in arguments[1:]])
        return _either([describe(a) for a in arguments])
    if origin is list:
        inner = arguments[0]
        if is_group(inner):
            return "a list of {" + ", ".join(f.name for f in fields(inner)) + "}"
        if get_origin(inner) is Literal:
            return "a list of " + " and ".join(str(a) for a in get_args(inner))
        return f"a list of {describe(inner).split(' ', 1)[1]}s"
    if is_mapping(hint):
        return "a mapping of names to " + ("values" if arguments[1] is Any else f"{describe(arguments[1]).split(' ', 1)[1]}s")
    return str(hint)


def choices(hint: Any) -> list[str]:
    """Return the words that ``hint`` allows, or an empty list where it is not a choice."""
    if get_origin(hint) is Literal:
        return [str(a) for a in get_args(hint)]
    return [word for a in get_args(hint) for word in choices(a)]


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that ``name`` most likely meant: same last part first, then the closest spelling."""
    candidates = list(candidates)
    name = name.replace("-", "_")
    same_leaf = [c for c in candidates if c.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    for pool, cutoff in ((same_leaf, 0.0), (candidates, 0.6)):
        if found := difflib.get_close_matches(name, pool, n=1, cutoff=cutoff):
            return found[0]
    leaves = {c.rsplit(".", 1)[-1]: c for c in candidates}
    found = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.7)
    return leaves[found[0]] if found else None


def unknown_setting(name: str, config_class: type) -> ConfigError:
    """Build the error for a name that is no setting of ``config_class``, with the nearest one that is."""
    groups = groups_of(config_class)
    known = settings_of(config_class)
    if name in groups:
        member = next(n for n in known if n.startswith(f"{name}."))
        return ConfigError(f"{name} is a group of settings, not a setting; set its members, for example {member}.")
    whole = next((n for n in known if name.startswith(f"{n}.") and is_mapping(known[n].hint)), None)
    if whole is not None:
        return ConfigError(f"{name} is not a setting, {whole} is; write {whole} as {{{name[len(whole) + 1 :]}: ...}}.")
    if (here := called_here(name, known)) is not None:
        return ConfigError(f"{name} is not a setting; {here}")
    guess = nearest(name, known)
    return ConfigError(f"{name} is not a setting; " + (f"did you mean {guess}?" if guess else "--help lists all settings."))


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: The file is missing, unreadable, empty, malformed (with the line) or not a mapping.
    """
    path = Path(path)
    try:
        text = None if path.is_dir() else path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a YAML file of settings, or give the settings as flags.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; name a YAML file of settings.") from None
    except (OSError, ValueError) as error:  # ValueError for a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}); name a readable YAML file.") from None
    if text is None:
        raise ConfigError(f"{path} is a folder, not a YAML file; name the file, for example {path / 'config.yaml'}.")
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}: {problem}; correct the YAML there.") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply; correct the YAML there.") from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise ConfigError(f"{path}: {error}; correct the YAML there, or put the value in quotes.") from None
    if content is None:
        raise ConfigError(f"{path} is empty; write settings in it, or leave it out and give them as flags.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {_kind(content)}, not 'name: value' settings; --print-config writes an example.")
    return content


def _kind(value: Any) -> str:
    return {list: "a list", str: "a line of text", bool: "one word", int: "a number", float: "a number"}.get(
        type(value), "a value"
    )


def flatten(content: Mapping[Any, Any], config_class: type, prefix: str = "", root: type | None = None) -> dict[str, Any]:
    """Turn nested settings into ``{full name: value}``; a group without content is left at its defaults.

    Raises:
        ConfigError: A key is no setting, or a group is given a plain value; names the full key.
    """
    root = root or config_class
    hints = get_type_hints(config_class)
    flat: dict[str, Any] = {}
    for key, value in content.items():
        first, _, rest = str(key).partition(".")
        name, hint = prefix + first, hints.get(first)
        if hint is None or (rest and not is_group(hint)):
            raise unknown_setting(f"{prefix}{key}", root)
        if not is_group(hint):
            check_items(name, hint, value)
            found = {name: value}
        elif rest or isinstance(value, Mapping):
            found = flatten({rest: value} if rest else value, hint, f"{name}.", root)
        elif value is not None:
            member = fields(hint)[0].name
            raise ConfigError(
                f"{name}={value!r} is not a group of settings; indent its members below it, for example {member}."
            )
        else:
            continue
        if twice := flat.keys() & found.keys():
            raise ConfigError(f"{min(twice)} is given twice, nested and with dots; leave one out.")
        flat |= found
    return flat


def check_items(name: str, hint: Any, value: Any) -> None:
    """Refuse an unknown key inside a list of small dataclasses such as ``reward.sources``."""
    inner = item_class(hint)
    if inner is None or not isinstance(value, list):
        return
    known = [field.name for field in fields(inner)]
    for index, item in enumerate(value):
        for key in item if isinstance(item, Mapping) else ():
            if key not in known:
                guess = nearest(str(key), known)
                remedy = f"did you mean {name}[{index}].{guess}?" if guess else f"choose among {_either(known)}."
                raise ConfigError(f"{name}[{index}].{key} is not a setting; {remedy}")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``flatten``: ``{"model.lora.r": 8}`` becomes ``{"model": {"lora": {"r": 8}}}``."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def build(config_class: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Build the frozen dataclasses from complete nested values.

    Raises:
        ConfigError: A check of the dataclasses, with the full name of the setting before it.
    """
    hints = get_type_hints(config_class)
    arguments = {}
    for name, value in values.items():
        hint, full = hints[name], prefix + name
        if is_group(hint):
            value = build(hint, value, f"{full}.")
        elif (inner := item_class(hint)) is not None:
            value = value and [build(inner, item, f"{full}[{index}].") for index, item in enumerate(value)]
        arguments[name] = _checked(full, hint, value)
    try:
        return config_class(**arguments)
    except ConfigError as error:
        starts_with_name = str(error).split("=", 1)[0] in arguments
        raise ConfigError(prefix + str(error) if starts_with_name else str(error)) from None


def _checked(name: str, hint: Any, value: Any) -> Any:
    """Refuse what the parser lets pass, null for a setting that has no null and infinity; make floats of ints."""
    allowed = get_args(hint) or (hint,)
    if value is None and NoneType not in allowed:
        raise ConfigError(f"{name}=null is not {describe(hint)}; leave it out to get the default.")
    if is_mapping(hint):
        return _json_like(name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not a finite number; write a finite one.")
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in allowed and int not in allowed else value


def _json_like(name: str, value: Any) -> Any:
    """Return what a checkpoint's JSON gives back unchanged: names are text, and YAML's dates the text that was written."""
    if isinstance(value, Mapping):
        if others := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{name}={value!r} has the key {others[0]!r}, which is no name; put it in quotes.")
        return {key: _json_like(name, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_like(name, inner) for inner in value]
    return value.isoformat() if isinstance(value, date) else value


def as_values(config: Any) -> dict[str, Any]:
    """Return a config as nested plain values (the inverse of ``build``)."""
    return asdict(config)
