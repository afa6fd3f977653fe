"""Whether others used the machine, from accounts that are written here."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_ppo.profiling.benchmarks.peers import load
from hydra_ppo.profiling.benchmarks.peers.load import GRAIN, REPEATS, Reading, between, undisturbed

STAT = "cpu  100 10 30 800 40 5 15 7 60 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 5 0\n"
PROCESS = "42 (a (b) c) S 1 42 42 0 -1 4194304 900 0 3 0 250 33 0 0 20 0 3 0 100 1000 10"


def test_accounts_are_read():
    # user 100, nice 10, system 30, interrupts 5 and 15; idle 800 and 40; the 60 of guests are in user
    assert load.machine_ticks(STAT) == (1007, 160, 7)
    assert load.process_ticks(PROCESS) == 250 + 33


def test_load_by_hand():
    before = Reading(total=1000, busy=500, steal=0, own=100)
    found = between(before, Reading(total=2000, busy=1300, steal=20, own=850))
    assert (found.others, found.steal, found.disturbed) == (0.05, 0.02, False)  # 800 busy, 750 of them its own
    assert between(before, Reading(2000, 1300, 20, 849)).disturbed  # one tick more of others
    assert between(before, Reading(2000, 1250, 51, 850)).disturbed  # stolen
    assert between(before, Reading(2000, 1200, 0, 850)).others == 0  # ticks are rounded; never below 0
    # In a short turn a few ticks are nobody's fault.
    assert not between(before, Reading(1010, 500 + GRAIN, 0, 100)).disturbed
    assert between(before, Reading(1010, 501 + GRAIN, 0, 100)).disturbed


class Machine:
    """Writes accounts in which turns of 1000 ticks pass, others using given numbers of them."""

    def __init__(self, folder: Path, others: list[int]) -> None:
        self.folder, self.others = folder, others
        self.total = self.busy = self.own = self.turns = 0
        (folder / "42").mkdir()
        self._write()

    def turn(self) -> int:
        self.total += 1000
        self.own += 500
        self.busy += 500 + self.others[self.turns]
        self.turns += 1
        self._write()
        return self.turns

    def _write(self) -> None:
        (self.folder / "stat").write_text(f"cpu  {self.busy} 0 0 {self.total - self.busy} 0 0 0 0 0 0\n")
        fields = " ".join(["0"] * 10)
        (self.folder / "42" / "stat").write_text(f"42 (x) S {fields} {self.own} 0 0\n")


@pytest.mark.parametrize(
    ("others", "turns", "disturbed"),
    [([10], 1, False), ([200, 300, 10], 3, False), ([200] * 9, REPEATS + 1, True)],
    ids=["quiet", "two repeats", "never quiet"],
)
def test_disturbed_turn_is_taken_again(tmp_path, others, turns, disturbed):
    machine = Machine(tmp_path, others)
    said: list[str] = []
    found, seen = undisturbed(machine.turn, 42, said.append, tmp_path)
    assert seen is not None
    assert (found, machine.turns, seen.disturbed) == (turns, turns, disturbed)
    assert len(said) == turns - 1
    assert seen.others == others[turns - 1] / 1000


def test_without_accounts_a_turn_is_taken_once(tmp_path):
    assert undisturbed(lambda: 7, 42, pytest.fail, tmp_path / "none") == (7, None)
