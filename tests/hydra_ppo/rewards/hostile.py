"""Reward functions as people write them, and worse; this module imports little, for each test has a process for it."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import time


class Stop(BaseException):
    """What `except Exception` lets through."""


STATE = {"calls": 0}


def counts(prompts, responses):
    STATE["calls"] += 1
    return [float(STATE["calls"])] * len(responses)


def draws(prompts, responses):
    return [random.random() for _ in responses]


def draws_numpy(prompts, responses):
    import numpy  # as late as can be

    return numpy.random.rand(len(responses))


def sleeps(prompts, responses):
    time.sleep(3600)
    return []


def regular_expression(prompts, responses):
    return [float(bool(re.fullmatch("(a+)+b", "a" * 40))) for _ in responses]


def long_sum(prompts, responses):
    return [float(sum(range(10**13)))] * len(responses)


def long_power(prompts, responses):
    return [float(7 ** (10**9) % 10)] * len(responses)


def ignores_signals(prompts, responses):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def endless(prompts, responses):
    while True:
        yield 1.0


def exits(prompts, responses):
    sys.exit()


def exits_with_3(prompts, responses):
    os._exit(3)


def crashes(prompts, responses):
    os.kill(os.getpid(), signal.SIGSEGV)


def runs_out_of_memory(prompts, responses):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupts(prompts, responses):
    raise KeyboardInterrupt


def stops(prompts, responses):
    raise Stop("in the\nname of the law")


def divides(prompts, responses):
    return [1 / (len(text) - len(text)) for text in responses]


def _length(text):
    return float(len(text))


def pools(prompts, responses):
    """Forks workers, ends them with SIGTERM, and waits for them."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(_length, responses)


def leaves_a_child(prompts, responses):
    if os.fork() == 0:
        time.sleep(3600)
    sys.exit(1)


def reads_input(prompts, responses):
    return [float(len(input())) for _ in responses]


def tells_its_process(prompts, responses):
    return [float(os.getpid())] * len(responses)


def a_lambda(prompts, responses):
    return {"part": [1.0] * len(responses), "other": [2.0] * len(responses)}


def one_argument(responses):
    return [float(len(text)) for text in responses]


def of_what(completions):
    return [0.0 for _ in completions]


def keyword_only(*, responses, answer):
    return [float(text == right) for text, right in zip(responses, answer, strict=True)]


async def asynchronous(prompts, responses):
    return [float(len(text)) for text in responses]


class Judge:
    """A class, whose object is made once."""

    def __init__(self):
        self.made = 1.0

    def __call__(self, prompts, responses):
        self.made += 1
        return [self.made] * len(responses)


class WithArguments:
    def __init__(self, model):
        self.model = model

    def __call__(self, prompts, responses):
        return []


class Uncallable:
    pass
