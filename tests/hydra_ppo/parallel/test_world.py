"""What several processes do together; each test starts some, of gloo."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hydra_ppo.errors import ConfigError, DataError, HydraError, RankError
from hydra_ppo.parallel import world as module
from hydra_ppo.parallel.environment import Place
from hydra_ppo.parallel.failures import OtherOutOfMemory
from hydra_ppo.parallel.joining import join
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.runtime.exhaustion import is_out_of_memory
from hydra_ppo.runtime.interruption import StopRequested
from tests.ranks import together


@dataclass
class Found:
    value: float


def meet(world: World):
    """Everything that works, in one go."""
    rank, found = world.rank, {}
    found["made"] = world.from_main(lambda: Found(rank + 0.5), "made")
    found["all"] = world.gather(("rank", rank))
    module.BUCKET, before = 5, module.BUCKET  # so that tensors are cut, and several share a sum
    tensors = [torch.arange(7.0) * (rank + 1), torch.ones(2, 3).T[:, :1] * rank, torch.tensor(2.0), torch.zeros(0)]
    half = torch.full((3,), 0.5 + rank, dtype=torch.bfloat16)
    world.sum([*tensors, half])
    module.BUCKET = before
    found["sums"] = [tensor.tolist() for tensor in [*tensors, half]]
    one, other, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        other.grad = torch.tensor([5.0, 6.0])
    loss = torch.tensor([1.0 + rank])
    world.sum_gradients([one, other, none], [loss])
    found["gradients"] = [one.grad.tolist(), other.grad.tolist(), none.grad, loss.tolist()]
    copied = torch.full((2,), float(rank))
    world.copy_from_main([copied])
    found["copied"] = copied.tolist()
    world.check_alike([copied, torch.ones(3)], "step=1")
    world.check_same("position", (3, 0), "", "here")
    found["waited"] = 0 <= world.waiting_share() < 1
    return found


def test_what_comes_of_it_is_everybodys():
    for found in together(meet):
        assert found["made"] == Found(0.5)
        assert found["all"] == [("rank", 0), ("rank", 1)]
        sevens, column, scalar, empty, half = found["sums"]
        assert sevens == [3.0 * n for n in range(7)]
        assert column == [[1.0], [1.0], [1.0]]
        assert (scalar, empty) == (4.0, [])
        assert half == [2.0, 2.0, 2.0]
        assert found["gradients"] == [[3.0, 6.0], [5.0, 6.0], None, [3.0]]
        assert found["copied"] == [0.0, 0.0]
        assert found["waited"]


def test_alone_nothing_is_sent():
    tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    ALONE.sum([tensor])
    ALONE.sum_gradients([parameter])
    assert tensor.tolist() == [1.0, 1.0]
    assert parameter.grad is None
    assert ALONE.gather(3) == [3]
    assert ALONE.from_main(lambda: 4, "") == 4
    assert ALONE.share([3, 1, 2], lambda piece: piece) == [(3, True), (1, True), (2, True)]
    with pytest.raises(ZeroDivisionError):
        ALONE.together(lambda: 1 // 0, "")


def test_as_many_rows_as_asked_where_all_have_some():
    two = World(Place(0, 2))
    assert two.rows_at_once(8, 4) == 4
    assert two.rows_at_once(8, 8) == 4
    assert two.rows_at_once(4, 3) == 3  # 3 and 1
    assert two.rows_at_once(1, 3) == 1
    assert ALONE.rows_at_once(8, 8) == 8


def agree(world: World, errors):
    def work():
        if (error := errors[world.rank]) is not None:
            raise error
        return "done"

    seen = []
    for _ in range(2):
        try:
            seen.append(world.together(work, "step=1"))
        except RuntimeError as error:
            seen.append((type(error).__name__, str(error), is_out_of_memory(error)))
    return seen


def test_memory_that_runs_out_in_one_runs_out_in_all_and_the_work_goes_on():
    lack = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 MiB")
    other, own = together(agree, [None, lack])
    assert own == [("OutOfMemoryError", str(lack), True)] * 2
    assert other == [("OtherOutOfMemory", f"out of memory on rank 1: OutOfMemoryError: {lack}", True)] * 2
    assert issubclass(OtherOutOfMemory, RuntimeError)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_in_one_stops_all(rank):
    errors = [None, None]
    errors[rank] = StopRequested("SIGTERM")
    assert [type(found) for found in together(agree, errors)] == [StopRequested, StopRequested]


def test_a_failure_in_one_fails_all_and_rank_0_says_it():
    lack = torch.OutOfMemoryError("CUDA out of memory.")
    other, own, third = together(agree, [None, DataError("row 3 is broken"), lack], size=3)
    assert (type(own), str(own)) == (DataError, "row 3 is broken")
    assert (type(other), str(other)) == (DataError, "rank 1: row 3 is broken")
    assert (type(third), str(third)) == (DataError, "rank 1: row 3 is broken")
    assert own.said_by == other.said_by == third.said_by == 0


def test_an_error_of_others_code_keeps_its_name():
    other, own = together(agree, [None, ValueError("nonsense")])
    assert (type(other), str(other)) == (HydraError, "rank 1: ValueError: nonsense")
    assert type(own) is ValueError


def fail_between(world: World):
    """Rank 1 raises where nobody agrees on anything; the others learn of it at the next meeting."""
    world.together(lambda: None, "first")
    if world.rank == 1:
        raise ConfigError("setting=1 is wrong.")
    world.together(lambda: None, "second")


def test_an_error_between_meetings_reaches_all():
    other, own = together(fail_between)
    assert (type(other), str(other)) == (ConfigError, "rank 1: setting=1 is wrong.")
    assert (type(own), str(own)) == (ConfigError, "setting=1 is wrong.")


def fail_last(world: World):
    if world.rank == 0:
        raise OSError("the disk is full")


def test_an_error_after_the_last_meeting_reaches_all():
    own, other = together(fail_last)
    assert type(own) is OSError
    assert (type(other), str(other)) == (HydraError, "rank 0: OSError: the disk is full")


def come_apart(world: World):
    world.together(lambda: None, f"step={world.rank}")


def test_processes_at_different_places_are_stopped():
    for found in together(come_apart):
        assert type(found) is RankError
        assert "come apart: step=0 | step=1" in str(found)


def differ(world: World):
    world.check_alike([torch.full((4,), 1.0 + 1e-7 * world.rank)], "step=2")


def test_a_bit_that_differs_is_found():
    for found in together(differ):
        assert type(found) is RankError
        assert "step=2: rank 1 no longer holds what rank 0 does" in str(found)


def unlike(world: World):
    world.check_same("the checkpoint", (3, world.rank), "share the folder", "here")


def test_unequal_checkpoints_are_refused():
    for found in together(unlike):
        assert type(found) is ConfigError
        assert str(found) == "the checkpoint is (3, 0) on rank 0 and (3, 1) on rank 1; share the folder."


def run_short(world: World):
    """Memory runs out where all have gone on: nothing can be done again."""

    def lack():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    world.alike(lack if world.rank == 1 else lambda: None, "step=4")
    world.together(lambda: None, "next")


def test_memory_that_runs_out_after_a_meeting_is_no_reason_to_do_it_again():
    other, own = together(run_short)
    assert type(own) is RankError
    assert not is_out_of_memory(own)
    assert str(other).startswith("rank 1: step=4: out of memory in a step that the other processes have done")


def die(world: World, rank: int, how: str):
    world.together(lambda: None, "first")
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        time.sleep(60)
    begun = time.monotonic()
    try:
        world.together(lambda: None, "second")
    except RankError as error:
        return str(error), error.said_by, time.monotonic() - begun
    return None


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_is_named(rank):
    found = together(die, rank, "killed", size=3)
    left = [result for number, result in enumerate(found) if number != rank]
    speaker = 1 if rank == 0 else 0
    for text, said_by, seconds in left:
        assert f"rank {rank} " in text, text
        assert "ended without a word" in text
        assert said_by == speaker
        assert seconds < 20


def hang(world: World):
    world.together(lambda: None, "first")
    if world.rank == 1:
        time.sleep(8)
        return None
    try:
        world.together(lambda: None, "second")
    except RankError as error:
        return str(error)
    return None


def test_a_rank_that_hangs_is_named_after_the_time_limit(monkeypatch):
    said, _ = together(hang_briefly, timeout=2.0)
    assert "rank 1 " in said
    assert "did not answer within run.rank_timeout=2 s" in said


def hang_briefly(world: World):
    from hydra_ppo.parallel import missing

    missing.ANSWER = 1.0
    return hang(world)


def test_nobody_comes(monkeypatch):
    from tests.ranks import free_port, variables

    for name, value in variables(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"WORLD_SIZE=2: rank 1 on .* did not meet the others at 127.0.0.1:.* within 1 s"):
        join(1.0)


def test_more_processes_than_gpus(monkeypatch):
    from tests.ranks import free_port, variables

    for name, value in variables(2, 4, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="LOCAL_RANK=2, and this machine has 2 GPUs; start at most 2 processes here"):
        join(1.0)
