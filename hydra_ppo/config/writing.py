"""Write settings as YAML with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

import yaml

from hydra_ppo.config.evidence import Evidence, evidence
from hydra_ppo.config.reading import Setting, describe, is_group, item_class, settings_of

COMMENT_WIDTH = 110


def render_yaml(config_class: type, values: Mapping[str, Any], comments: bool = True, why: Evidence | None = None) -> str:
    """Write nested ``values`` as YAML that loads back; a setting without a value becomes a commented ``???``.

    Args:
        config_class: Dataclass whose order, help and nesting the text follows.
        values: Nested values; only required settings may be absent.
        comments: Put each setting's help, type, default and where that comes from above it.
        why: where defaults come from; None is what is known of `config_class`.
    """
    lines: list[str] = []
    _render(
        config_class,
        values,
        "",
        "",
        _Known(settings_of(config_class), evidence(config_class) if why is None else why, comments),
        lines,
    )
    return "\n".join(lines).strip("\n") + "\n"


class _Known(NamedTuple):
    """What is known of each setting, by full name."""

    settings: Mapping[str, Setting]
    evidence: Evidence
    comments: bool


def _render(
    config_class: type,
    values: Mapping[str, Any],
    prefix: str,
    indent: str,
    known: _Known,
    lines: list[str],
) -> None:
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        hint, name = hints[field.name], prefix + field.name
        if is_group(hint):
            if known.comments:
                text = field.metadata.get("help") or (hint.__doc__ or "").split("\n")[0]
                lines += ["", *_comment(text, indent)]
            lines.append(f"{indent}{field.name}:")
            _render(hint, values.get(field.name, {}), f"{name}.", indent + "  ", known, lines)
            continue
        setting = known.settings[name]
        if known.comments:
            why = f" Why: {known.evidence[name][1]}." if name in known.evidence else ""
            default = "required" if setting.required else f"default {inline(_plain(setting.default))}"
            lines += _comment(f"{setting.help} ({describe(hint)}; {default}){why}", indent)
            for member in () if (inner := item_class(hint)) is None else fields(inner):
                lines += _comment(f"  {member.name}: {member.metadata.get('help', '')}", indent)
        if field.name in values:
            lines.append(f"{indent}{field.name}: {inline(_plain(values[field.name]))}")
        else:
            lines.append(f"{indent}# {field.name}: ???")


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        COMMENT_WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def inline(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip("\n")
