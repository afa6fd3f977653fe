"""Folders that are written beside their place and moved there when they are whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_ppo.errors import ConfigError

WRITING = ".writing-"
"""Begins the name of a folder that is not whole: of a process that is writing it, or died over it."""


def check_empty(setting: str, output: Path) -> None:
    """Refuse a folder that holds something already.

    Raises:
        ConfigError: naming it.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{setting}={str(output)!r} is not empty; choose another folder.")


@contextmanager
def whole_or_nothing(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which is moved to `output` when the block is done, and removed where it is not.

    Raises:
        ConfigError: where nothing can be written there.
    """
    from safetensors import SafetensorError

    aside = output.parent / f"{WRITING}{output.name}"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that died
        aside.mkdir(parents=True)
        yield aside
        if output.is_dir():
            output.rmdir()  # an empty one
        aside.replace(output)
    except OSError as error:
        if error.errno is None:  # what transformers says of files that it does not find
            raise
        raise _unwritten(output, str(error.strerror)) from error
    except SafetensorError as error:  # its own words for a disk that is full
        if re.search("i/?o ?error", str(error), re.IGNORECASE) is None:
            raise
        raise _unwritten(output, " ".join(str(error).split())[:120]) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unwritten(output: Path, why: str) -> ConfigError:
    return ConfigError(f"output={str(output)!r} cannot be written ({why}); make room, or choose another folder.")
