"""What every page here is: one HTML file in light and dark, readable on a phone, that makes no request."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5b626c; --paper: #ffffff; --rule: #d3d7dc; --band: #f2f4f6;
  --c0: #1f5a96; --c1: #c35a17; --c2: #2f8557; --c3: #8147ab; --c4: #a3284d; --c5: #0f7f8c; --c6: #7a6a00; --c7: #5c5c5c;
  --alarm: #b02a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2aab4; --paper: #15171a; --rule: #3b4047;
  --band: #22262b;
  --c0: #79b4ee; --c1: #f2a164; --c2: #6fcf9c; --c3: #c79aec; --c4: #f08aa8; --c5: #5fd0dc; --c6: #d9c64a; --c7: #b5b5b5;
  --alarm: #ff8080; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
a { color: var(--c0); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.5rem 0 1rem; }
.soft { color: var(--soft); font-size: 0.875rem; }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.875rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
th, td { padding: 0.25rem 0.6rem; text-align: left; vertical-align: bottom; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
thead th { background: var(--band); }
.right { text-align: right; font-variant-numeric: tabular-nums; }
table.fixed td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.total td { font-weight: 600; background: var(--band); }
img { display: block; width: 100%; min-width: 40rem; background: #ffffff; }
pre { overflow-x: auto; background: var(--band); padding: 0.75rem; font-size: 0.8125rem; border-radius: 0.25rem; }
code { font-size: 0.875em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; margin: 1rem 0; }
figure { margin: 0; border: 1px solid var(--rule); border-radius: 0.375rem; padding: 0.5rem 0.75rem; min-width: 0; }
figcaption { font-weight: 600; font-size: 0.9375rem; }
figcaption .soft { font-weight: 400; }
.legend { display: flex; flex-wrap: wrap; gap: 0 0.9rem; font-size: 0.8125rem; }
.legend span::before { content: ""; display: inline-block; width: 1.1em; border-top: 2.5px solid currentColor;
  margin-right: 0.35em; vertical-align: middle; }
.legend .held-out::before { border-top-style: dashed; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .up { text-anchor: end; } svg .across { text-anchor: middle; } svg .beside { text-anchor: start; fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; }
.mark { stroke: var(--alarm); stroke-width: 1; stroke-dasharray: 5 4; }
.line { fill: none; stroke: currentColor; stroke-width: 1.7; stroke-linejoin: round; }
.line.held-out { stroke-dasharray: 6 3; }
.dot { fill: currentColor; opacity: 0; } .dot.shown, .dot:hover { opacity: 1; }
.bar { fill: var(--c0); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.alarm { border-left: 4px solid var(--alarm); padding: 0.25rem 0.75rem; margin: 0.5rem 0; }
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center; margin: 0.75rem 0; }
input, select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--rule); border-radius: 0.25rem;
  padding: 0.25rem 0.5rem; max-width: 100%; }
.sample { border: 1px solid var(--rule); border-radius: 0.375rem; margin: 0.75rem 0; padding: 0.5rem 0.75rem; }
.sample[hidden] { display: none; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.5rem 1.5rem; }
.text { white-space: pre-wrap; unicode-bidi: isolate; }
.prompt { color: var(--soft); font-size: 0.875rem; }
"""


def html_page(title: str, body: str, script: str = "", *, is_live: bool = False) -> str:
    """Return a whole page.

    The policy in its head makes a browser refuse requests that a mistake might ask for, and every script but this one.

    Args:
        title: plain text.
        body: HTML.
        script: runs once the page is there.
        is_live: the page may ask the server that it came from for itself.
    """
    policy = f"default-src 'none'; img-src data:; style-src {_hashed(STYLE)}"
    policy += f"; script-src {_hashed(script)}" if script else ""
    policy += "; connect-src 'self'" if is_live else ""
    run = f"<script>{script}</script>\n" if script else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
{run}</body>
</html>
"""


def shown(text: str) -> str:
    """Return text for HTML: escaped, with what cannot be seen, or turns the direction of writing, spelled out."""
    return escape("".join(letter if _is_plain(letter) else f"\\u{ord(letter):04x}" for letter in text))


def _is_plain(letter: str) -> bool:
    return letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co")


def _hashed(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
