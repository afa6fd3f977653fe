"""Tables in a terminal of any width: cells wrap between words, what does not fit even so is a list, and nothing is cut."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST_WORD = 24
"""Characters of a word that stays whole; longer ones, such as paths, go on in the next line."""


def print_table(console: Console, table: Table) -> None:
    """Print a table so that no cell of it is cut."""
    for column in table.columns:
        words = [word for text in (column.header, *column.cells) for word in _plain(text).split()]
        column.min_width = min(max(map(len, words), default=0), LONGEST_WORD)
        column.overflow, column.no_wrap = "fold", False
    if _least_width(table) <= console.width:
        console.print(table)
    else:
        console.print(as_list(table), soft_wrap=True)


def _least_width(table: Table) -> int:
    """Return the columns of a terminal that the least widths of a table take, with what is around them."""
    _, right, _, left = table.padding
    edges = len(table.columns) + 1 if table.box else 0
    return sum((column.min_width or 0) + left + right for column in table.columns) + edges


def as_list(table: Table) -> Text:
    """Return what a table holds as lines: of each row its headers and cells, the first one ahead."""
    headers = [" ".join(_plain(column.header).split()) for column in table.columns]
    lines = [_plain(table.title)] if table.title else []
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        said = [" ".join(_plain(cell).split()) for cell in cells]
        named = [f"{header}: {cell}" if header else cell for header, cell in zip(headers, said, strict=True)]
        lines.append(named[0])
        lines += [f"  {line}" for line, cell in zip(named[1:], said[1:], strict=True) if cell]
    if table.caption:
        lines.append(_plain(table.caption))
    return Text("\n".join(lines))


def _plain(content: object) -> str:
    """Return a cell, header or title as it is shown, without markup."""
    return Text.from_markup(content).plain if isinstance(content, str) else str(content)
