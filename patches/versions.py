"""Checks a host's version before anything is patched."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from hydra_ppo.errors import HydraError


class HostError(HydraError, RuntimeError):
    """A host is missing, of a version that the patch does not know, or set up in a way that it cannot serve."""


def host_version(package: str, supported: str) -> Version:
    """Return the installed version of `package`.

    Raises:
        HostError: when it is not installed.
    """
    try:
        return Version(version(package))
    except PackageNotFoundError as error:
        raise HostError(f"{package} is not installed; supported is {supported}: pip install '{package}{supported}'.") from error


def require(package: str, lowest: str, below: str) -> Version:
    """Return the installed version of `package` where lowest <= version < below.

    Raises:
        HostError: naming what was found, what is supported, and the remedy.
    """
    supported = f">={lowest},<{below}"
    found = host_version(package, supported)
    # A pre-release of the first version that is too new is too new as well.
    if not Version(lowest) <= found or Version(found.base_version) >= Version(below):
        raise HostError(
            f"{package}=={found} is installed, but this patch supports {supported}; pip install '{package}{supported}', or use "
            "role_views(model) directly."
        )
    return found
