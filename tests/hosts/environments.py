"""Where each host runs: versions that are pinned by itself or that were current when it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra_ppo.profiling.benchmarks.peers.environments import TORCH, Environment, build_environment, install_beside

ROOT = Path(__file__).parents[2]

# Each also gets this package with its dependencies, so that the lower bounds in setup.cfg are tested, not believed.
BASES: dict[str, tuple[str, ...]] = {
    "transformers-4.46": (
        *(TORCH, "transformers==4.46.3", "peft==0.13.2", "accelerate==1.0.1", "rich", "tyro"),
        *("pytest", "parameterized", "requests"),  # for own_tests.py
    ),
    "transformers-4.57": (TORCH, "transformers==4.57.6", "peft==0.18.1"),
    "llamafactory": (TORCH, "llamafactory==0.9.3", "transformers==4.52.4", "peft==0.15.2", "pyarrow==20.0.0"),
    "swift": (TORCH, "ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0", "trl==0.29.1"),
}
"""Environments of their own, by name."""


@dataclass(frozen=True)
class Host:
    """One row of the table of hosts.

    Attributes:
        check: the script in this folder.
        base: the environment it runs in; None is the one of this project.
        beside: installed without dependencies on top.
        variables: environment variables.
        example: command that runs its example, from the root, with {folder} for a new folder.
        extra: one more script in this folder, which takes --output and writes its problems and notes there.
    """

    name: str
    check: str
    base: str | None = None
    beside: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    example: tuple[str, ...] = ()
    extra: str | None = None


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

EXAMPLES = "examples/hosts"
TRAIN, STEP = ("python", f"{EXAMPLES}/trl_train.py"), ("python", f"{EXAMPLES}/trl_step.py")

HOSTS: dict[str, Host] = {
    host.name: host
    for host in (
        Host("trl-1.12.0", "check_trl_train.py", beside=("trl==1.12.0",), example=TRAIN),
        Host("trl-0.29.1", "check_trl_train.py", beside=("trl==0.29.1",), example=TRAIN),
        Host("trl-0.28.0", "check_trl_train.py", "transformers-4.57", ("trl==0.28.0",)),
        Host("trl-0.12.2", "check_trl_train.py", "transformers-4.46", ("trl==0.12.2",)),
        Host("trl-0.11.4", "check_trl_step.py", "transformers-4.46", ("trl==0.11.4",), example=STEP, extra="own_tests.py"),
        Host("trl-0.8.6", "check_trl_step.py", "transformers-4.46", ("trl==0.8.6",), example=STEP, extra="own_tests.py"),
        Host(
            "llamafactory-0.9.3",
            "check_llamafactory.py",
            "llamafactory",
            example=("sh", f"{EXAMPLES}/llamafactory/run.sh", "{folder}"),
        ),
        Host(
            "ms-swift-4.6.0",
            "check_swift.py",
            "swift",
            variables={"USE_HF": "1"},
            example=("sh", f"{EXAMPLES}/swift/run.sh", "{folder}"),
        ),
        Host("loop", "check_loop.py", example=("python", f"{EXAMPLES}/loop.py")),
    )
}


def prepare(host: Host, folder: Path, say: Callable[[str], None]) -> Environment:
    """Install what `host` needs under `folder`, once, and return where to run its check.

    Raises:
        InstallError: when pip fails.
    """
    python, paths = sys.executable, []
    if host.base is not None:
        requirements = (*BASES[host.base], f"-e{ROOT}")
        python = build_environment(folder.resolve() / host.base, requirements, say)
    if host.beside:
        paths.append(str(install_beside(folder.resolve() / host.name, host.beside, python, say)))
    return Environment(python, {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **OFFLINE, **host.variables})
