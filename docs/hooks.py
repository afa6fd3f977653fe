"""Lets pages link to files outside of docs/: on GitHub those links work, on the site their text is shown as a path."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)[^)\s]*\)")


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Replace each such link by its text and the path in the repository."""
    return OUTSIDE.sub(lambda found: found[1] if found[1] == found[2] else f"{found[1]} (`{found[2]}`)", markdown)
