"""Tables in narrow terminals: whole words while they fit, a list where they do not, and nothing cut."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.runtime.tables import print_table

PATH = "/a/path/that/is/longer/than/any/word/that/stays/whole.jsonl"


def made() -> Table:
    table = Table("setting", "value", title=Text("What [there] is"))
    table.add_column("much\nmemory", justify="right")
    table.add_row(Text("data.train"), Text(PATH), "1,234.5")
    table.add_row(Text("reward [x]"), Text("two words"), "")
    return table


def printed(width: int) -> str:
    console = Console(file=StringIO(), width=width)
    print_table(console, made())
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60, 51])
def test_a_table_that_fits_stays_one(width):
    shown = printed(width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    cells = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert "".join(cell[1].strip() for cell in cells) == f"{PATH}two words"
    assert [cells[0][2].strip(), cells[-1][0].strip()] == ["1,234.5", "reward [x]"]


@pytest.mark.parametrize("width", [40, 12])
def test_one_that_does_not_is_a_list(width):
    assert printed(width) == (
        f"What [there] is\nsetting: data.train\n  value: {PATH}\n  much memory: 1,234.5\n"
        "setting: reward [x]\n  value: two words\n"
    )
