"""What all pages share: the look, the frame with its policy, and text of others made harmless."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape

COLOURS = 8
"""Colours of lines, `.c0` and so on; more lines than that begin again with the first."""

_LIGHT = ("#1f5a96", "#c2571a", "#2f7d4f", "#7d4fa0", "#0f8a8f", "#a3374f", "#7a6a12", "#5b6470")
_DARK = ("#7ab3ec", "#f2a066", "#78c896", "#c3a1e6", "#5fd0d4", "#f08ba0", "#d9c463", "#b3bcc8")

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1e22; --soft: #59616b; --paper: #ffffff; --card: #f7f8f9; --rule: #d5d9de;
  --band: #eef0f3; --good: #22713f; --warn: #8f5200; --bad: #b02a2a; --mark: #b02a2a;
  {" ".join(f"--c{number}: {colour};" for number, colour in enumerate(_LIGHT))} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e5e8eb; --soft: #a3abb5; --paper: #15181b; --card: #1c2024;
  --rule: #3a4047; --band: #262b31; --good: #7fd19c; --warn: #f0b25c; --bad: #ff8f8f; --mark: #ff8f8f;
  {" ".join(f"--c{number}: {colour};" for number, colour in enumerate(_DARK))} }} }}
{"".join(f".c{number} {{ --line: var(--c{number}); }} " for number in range(COLOURS))}
*, *::before, *::after {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 0.5rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 0.75rem; border-top: 1px solid var(--rule); padding-top: 1rem; }}
h3 {{ font-size: 1rem; margin: 1.25rem 0 0.5rem; }}
p {{ max-width: 46rem; }}
a {{ color: var(--c0); }}
code, pre {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.875em; }}
.soft {{ color: var(--soft); }}
.scroll {{ overflow-x: auto; margin: 0.75rem 0; max-width: 100%; }}
.scroll:focus-visible, svg:focus-visible, summary:focus-visible {{ outline: 2px solid var(--c0); outline-offset: 2px; }}
table {{ border-collapse: collapse; font-size: 0.875rem; overflow-wrap: normal; }}
.caption {{ font-size: 0.875rem; font-weight: 600; margin: 1rem 0 0.25rem; }}
.caption + .scroll {{ margin-top: 0; }}
th, td {{ padding: 0.3rem 0.7rem; text-align: left; vertical-align: bottom; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }}
thead th {{ background: var(--band); }}
td.wrap {{ white-space: pre-wrap; min-width: 16rem; overflow-wrap: anywhere; vertical-align: top; }}
.right {{ text-align: right; font-variant-numeric: tabular-nums; }}
td:first-child {{ position: sticky; left: 0; background: var(--paper); }}
tr.total td {{ font-weight: 600; background: var(--band); }}
@media (max-width: 40rem) {{ td:first-child {{ min-width: 8.5rem; white-space: normal; overflow-wrap: anywhere; }} }}
img {{ display: block; width: 100%; min-width: 40rem; }}
"""


def page(title: str, body: str, *, style: str = "", script: str = "", connects: bool = False) -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML.
        style, script: added to the page; neither may hold text of others.
        connects: whether it may ask the server that it came from for more.
    """
    # The policy makes a browser refuse requests that a mistake in this file might ask for.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if script:  # this one and no other, which a text that came through unescaped would be
        digest = b64encode(sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    policy += "; connect-src 'self'" if connects else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
"""What is not seen, or turns the order of what is, or is no character at all; a line break and a tab are neither."""


def text(value: object) -> str:
    """Return text as HTML that shows it and does nothing: escaped, and what would not be seen as its number."""
    return _ODD.sub(lambda found: f"[U+{ord(found[0]):04X}]", escape(str(value).replace("\r\n", "\n")))


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    right: Sequence[int] = (),
    wrapped: Sequence[int] = (),
    total: Iterable[int] = (),
) -> str:
    """Return a table that scrolls inside itself; all of it is escaped here.

    Args:
        headers: a line break in one stays.
        right: columns of numbers.
        wrapped: columns of long texts.
        total: rows that are set apart.
    """
    css = ["right" if column in right else "wrap" if column in wrapped else "" for column in range(len(headers))]
    css = [f' class="{name}"' if name else "" for name in css]
    head = "".join(
        f'<th scope="col"{name}>{text(header).replace(chr(10), "<br>")}</th>' for header, name in zip(headers, css, strict=True)
    )
    apart = set(total)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td{name}>{text(cell)}</td>" for cell, name in zip(row, css, strict=True))
        lines.append(f'<tr class="total">{cells}</tr>' if number in apart else f"<tr>{cells}</tr>")
    label = f' role="region" aria-label="{text(caption)}"' if caption else ""
    title = f'<p class="caption">{text(caption)}</p>\n' if caption else ""  # not in the table, as narrow as which it would be
    return (
        f'{title}<div class="scroll" tabindex="0"{label}><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )
