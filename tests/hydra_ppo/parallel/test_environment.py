from __future__ import annotations

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.errors import ConfigError
from hydra_ppo.parallel.environment import Place, place, speaks
from tests.ranks import variables


def test_a_process_alone():
    assert place({}) == Place(0, 1, 0, 1)
    assert place({"WORLD_SIZE": "1", "RANK": "0"}) == Place()
    assert place({}).is_main


def test_what_torchrun_sets():
    assert place(variables(1, 4, 29500)) == Place(1, 4, 1, 4)
    assert place({"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) == Place(5, 8, 0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": ""}, "WORLD_SIZE=2 .*RANK is not set; start them with torchrun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' is not a whole number"),
    ],
)
def test_half_a_place_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        place(variables(1, 2, 29500) | changes)


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in variables(1, 2, 29500).items():
        monkeypatch.setenv(name, value)


def test_one_speaks(second_of_two):
    assert speaks(1)
    assert not speaks(0)
    assert not speaks(None)  # one of each machine


@pytest.mark.parametrize("rank", [0, 1])
def test_commands_of_one_process(second_of_two, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert main(["inspect", "."]) == 2
    said = capsys.readouterr().err
    assert said == ("" if rank else "hydra-ppo inspect runs in one process, and WORLD_SIZE=2; start it without torchrun.\n")


def test_help_comes_once(second_of_two, capsys):
    assert main(["ppo", "--help"]) == 0
    assert capsys.readouterr().out == ""
