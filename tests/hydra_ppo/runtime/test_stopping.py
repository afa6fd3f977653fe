"""Signals, time limits and random sources: the small parts that stopping and going on are made of."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress

import numpy
import pytest
import torch

from hydra_ppo.errors import ConfigError
from hydra_ppo.runtime import interruption, random_sources
from hydra_ppo.runtime.interruption import StopRequested, check_stop, stopping_at_once, stopping_on_signals
from hydra_ppo.runtime.time_limit import TimeLimitExceeded, time_limit


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_the_first_signal_is_heard_where_it_is_asked_for():
    with stopping_on_signals():
        check_stop()
        send()
        with pytest.raises(StopRequested):
            check_stop()
    check_stop()  # outside nothing is left of it


def test_the_second_signal_stops_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "TOGETHER", 0.0)
    with stopping_on_signals():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_signals_that_come_together_are_one():
    with stopping_on_signals():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            send(number)
        with pytest.raises(StopRequested):
            check_stop()


def test_a_block_inside_another_forgets_no_signal():
    with stopping_on_signals():
        send(signal.SIGHUP)
        with stopping_on_signals(), pytest.raises(StopRequested):
            check_stop()
        with pytest.raises(StopRequested):
            check_stop()


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping_on_signals():
            send(signal.SIGHUP)
            check_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_has_the_signals_of_every_process():
    with stopping_on_signals():
        child = os.fork()
        if child == 0:
            defaults = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL)
            os._exit(tuple(signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)) != defaults)
        assert os.waitpid(child, 0)[1] == 0


def test_waiting_is_cut_short():
    threading.Timer(0.2, send).start()
    with stopping_on_signals(), pytest.raises(StopRequested, match="SIGTERM"), stopping_at_once():
        time.sleep(30)


def made_into_another_error():
    try:
        send()
    except StopRequested:
        raise ImportError("cannot load module more than once per process") from None


def swallowed():
    with suppress(BaseException):
        send()


@pytest.mark.parametrize("foreign", [made_into_another_error, swallowed])
def test_whatever_foreign_code_makes_of_a_stop_it_is_one(foreign):
    with stopping_on_signals(), pytest.raises(StopRequested), stopping_at_once():
        foreign()


def test_errors_of_its_own_stay_such():
    with stopping_on_signals(), pytest.raises(ImportError), stopping_at_once():
        raise ImportError("of its own")


def test_handlers_come_back_also_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ValueError), stopping_on_signals():
        raise ValueError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_gets_no_signals_and_runs_on():
    done = []

    def work():
        with stopping_on_signals():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("wait", [lambda: time.sleep(30), lambda: [None for _ in iter(int, 1)]])
def test_a_time_limit(wait):
    begun = time.monotonic()
    with pytest.raises(TimeLimitExceeded), time_limit(0.1):
        wait()
    assert time.monotonic() - begun < 20
    with time_limit(30.0):
        pass
    with time_limit(None):
        pass


def test_a_time_limit_needs_the_main_thread():
    found = []

    def work():
        try:
            with time_limit(1.0):
                pass
        except ConfigError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["reward.time_limit=1.0 needs the main thread of the process; train there, or set it to null."]


def draw(generator):
    return (
        torch.rand(3).tolist(),
        numpy.random.rand(3).tolist(),
        numpy.random.standard_normal(),
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        torch.rand(3, generator=generator).tolist(),
    )


def test_every_source_comes_back():
    generator = torch.Generator().manual_seed(5)
    draw(generator)  # leaves a second Gaussian number behind in numpy and Python
    tensors, values = random_sources.capture({"own": generator})
    first = draw(generator)
    assert draw(generator) != first
    random_sources.restore(tensors, values, {"own": generator})
    assert draw(generator) == first


def test_kept_sources_are_as_before():
    generator = torch.Generator().manual_seed(5)
    tensors, values = random_sources.capture({"own": generator})
    expected = draw(generator)
    random_sources.restore(tensors, values, {"own": generator})
    with random_sources.kept():
        torch.rand(9), numpy.random.rand(9), random.random()
    assert draw(generator) == expected
