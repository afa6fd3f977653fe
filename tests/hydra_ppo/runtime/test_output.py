"""What cannot be printed is dropped, and ends nothing."""

from __future__ import annotations

import io
import os
import sys

import pytest

from hydra_ppo.cli import main as cli
from hydra_ppo.runtime.output import finish, losing_output, settle_output, without_input


class Broken(io.StringIO):
    """A pipe that nobody reads, a terminal that is gone, or a full disk."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


ERRORS = [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("error", ERRORS)
def test_lost_output_raises_nothing(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with losing_output():
        print("to nobody", flush=True)
        print("to nobody", file=sys.stderr)
        sys.stdout.writelines(["a", "b"])
        assert sys.stdout.write("abc") == 3
        assert not sys.stdout.isatty()
    with pytest.raises(OSError, match=error.strerror):
        print("outside it does")
    assert finish(Broken(error)) is error


def test_a_closed_stream_raises_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with losing_output():
        print("to nobody", flush=True)
    assert finish(closed) is None


def test_letters_that_a_terminal_lacks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with losing_output():
        print("naïve")
    settle_output()
    print("你好")
    assert stream.buffer.getvalue() == b"na\\xefve\n\\u4f60\\u597d\n"


def test_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    with without_input(), pytest.raises(EOFError):
        input()
    assert input() == "yes"


def test_streams_that_are_closed_from_the_start():
    """Where standard error is closed, the next file that is opened would have its number."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for number in (0, 1, 2):
            os.close(number)
        sys.stdin = sys.stdout = sys.stderr = None
        settle_output()
        first = os.open(os.devnull, os.O_RDONLY)
        print("to nobody")
        os.write(write, b"fine" if first > 2 else b"low")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"fine"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(("error", "code"), [(ERRORS[0], 0), (ERRORS[2], 1)])
def test_other_commands_say_so(error, code, monkeypatch, capsys):
    class Full(Broken):
        def write(self, text: str) -> int:  # as a buffer that is written at the end
            return len(text)

    monkeypatch.setattr(sys, "stdout", Full(error))
    assert cli.main(["--version"]) == code
    assert ("standard output cannot be written (No space left on device)" in capsys.readouterr().err) == bool(code)
