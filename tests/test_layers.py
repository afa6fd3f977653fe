"""The house stands: one floor for each room, imports that point down, no circle, and a picture that is not stale."""

from __future__ import annotations

import ast
import re

import pytest

from tests import house

LONGEST = 400
"""Lines of a file of the library; what is longer is two things."""


def test_every_room_has_one_floor():
    rooms = [room for rooms in house.FLOORS for room in rooms]
    assert sorted(rooms) == sorted({house.room_of(module) for module in house.modules()})


@pytest.mark.parametrize("room", sorted(house.FLOOR))
def test_imports_point_down(room):
    assert [arrow for arrow in house.arrows_up() if house.room_of(arrow[0]) == room] == []


def test_every_import_is_of_a_module():
    """A name that a package's `__init__` would have to hand on has a home of its own."""
    known = house.modules().keys()
    strangers = {(module, other) for module in known for other in house.imports(module) if other not in known}
    assert {(module, other) for module, other in strangers if other not in house.TOP_LEVEL} == set()


def test_there_is_no_circle():
    assert house.circles() == []


def test_a_wrong_arrow_and_a_circle_are_seen(monkeypatch, tmp_path):
    """What reads the house sees imports in functions and those for types alone."""
    low, high = tmp_path / "low.py", tmp_path / "high.py"
    low.write_text("def late():\n    from hydra_ppo.training import high\n")
    high.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hydra_ppo.compute.low import late\n")
    monkeypatch.setattr(house, "modules", lambda: {"compute.low": low, "training.high": high})
    house.imports.cache_clear()
    try:
        assert house.arrows_up() == [("compute.low", "training.high")]
        assert house.circles() == [("compute.low", "training.high")]
    finally:
        house.imports.cache_clear()


APART = [*house.ROOT.glob("tests/hosts/*.py"), *house.ROOT.glob("examples/**/*.py"), house.ROOT / "tests/soak.py"]


@pytest.mark.parametrize("path", APART, ids=lambda path: path.name)
def test_scripts_that_the_suite_does_not_run_import_what_there_is(path):
    """Some need another environment; a module that was moved would be found out only there."""
    known = {name: file.read_text() for name, file in house.modules().items()}
    known[""] = (house.ROOT / "hydra_ppo/__init__.py").read_text()
    for node in ast.walk(ast.parse(path.read_text())):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "hydra_ppo":
            inner = module.partition(".")[2]
            for alias in node.names:
                there = f"{inner}.{alias.name}" in known or re.search(rf"\b{alias.name}\b", known.get(inner, ""))
                assert there, f"{module} has no {alias.name}"


@pytest.mark.parametrize("package", sorted(house.packages()))
def test_a_package_is_one_docstring(package):
    """It says what the room is for, what may be imported from outside, and what must never be there."""
    tree = ast.parse(house.packages()[package].read_text())
    text = ast.get_docstring(tree)
    assert text
    if package != "__init__":  # the door of the house resolves the few public names
        assert len(tree.body) == 1
    assert "From outside:" in text
    assert "Never:" in text


@pytest.mark.parametrize("package", sorted(set(house.packages()) & set(house.FLOOR)))
def test_other_rooms_use_what_a_room_offers(package):
    """What is imported from outside stands under "From outside:"."""
    text = ast.get_docstring(ast.parse(house.packages()[package].read_text())) or ""
    offered = set(re.findall(r"`(\w+)", text[text.index("From outside:") : text.index("Never:")]))
    used = {other for module in house.modules() if house.room_of(module) != package for other in house.imports(module)}
    used = {other.removeprefix(f"{package}.").split(".")[0] for other in used if house.room_of(other) == package}
    assert used <= offered


@pytest.mark.parametrize("module", sorted(house.modules()))
def test_no_file_is_too_long(module):
    assert len(house.modules()[module].read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "module", ["config.settings", "config.reading", "cli.main", "cli.flags", "cli.dry_run", "cli.commands"]
)
def test_settings_and_help_need_no_torch(module):
    """`hydra-ppo --help` answers at once: nothing on its way imports torch before a command runs."""
    seen, todo = set(), [module]
    while todo:
        if (here := todo.pop()) not in seen:
            seen.add(here)
            assert not house.foreign(here) & {"torch", "transformers", "peft"}, here
            todo += sorted(house.at_once(here))


def test_the_picture_is_of_these_imports():
    assert house.PICTURE.read_text() == house.draw(), "run: python -m tests.house --draw"
