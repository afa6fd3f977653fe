"""bitsandbytes' AdamW with moments in 8 bits: whether it can be had here, and what training asks of it beyond that.

Each moment is a byte per number and a scale for 256 of them (Dettmers et al. 2022, arXiv 2110.02861, section 2). Parameters
of fewer than 4096 numbers keep fp32 moments. The paged kind keeps the bytes in memory that CUDA moves between host and
device by itself; moments of parameters of fewer than 100,000 numbers, and all scales, stay on the device.

torch and bitsandbytes are imported where they are needed: what is wrong is said before a weight is read.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = ("adamw-8bit", "paged-adamw-8bit")
"""Values of `optimizer.name` that need bitsandbytes."""
LEAST, LEAST_ON_CPU = "0.49", "0.50"
"""Versions of bitsandbytes that have these optimizers on a GPU, and on a CPU."""
PAGED_FROM = 100_000
"""Numbers of a parameter from which on the paged kind pages its moments."""


def check_available(name: str, device: str | None = None) -> None:
    """Refuse an 8-bit optimizer that cannot be had; pass every other name.

    Args:
        name: of `optimizer.name`.
        device: type of the device that trains: cpu, cuda; None where that is not known yet.

    Raises:
        ConfigError: bitsandbytes is missing or too old, or the optimizer does not run on that device.
    """
    if name not in NAMES:
        return
    if name == "paged-adamw-8bit" and device not in (None, "cuda"):
        raise ConfigError(
            f"optimizer.name={name!r} needs CUDA, which moves its pages, and the model is on {device!r}; use 'adamw-8bit' or "
            "'adamw-offloaded'."
        )
    least = LEAST_ON_CPU if device == "cpu" else LEAST
    remedy = f"pip install 'bitsandbytes>={least}', or use 'adamw' or 'adamw-offloaded'"
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"optimizer.name={name!r} needs bitsandbytes, which is not installed; {remedy}.") from None
    from packaging.version import Version

    if Version(found) < Version(least):
        where = "on a CPU " if device == "cpu" else ""
        raise ConfigError(f"optimizer.name={name!r} {where}needs bitsandbytes>={least}, not {found}; {remedy}.")


def build(name: str, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Build bitsandbytes' 8-bit AdamW, with `adopt` (takes over a saved state) and steps that can be tried again.

    Args:
        name: adamw-8bit or paged-adamw-8bit.
        groups: of parameters, with their rates.
        settings: lr, betas, eps, weight_decay.

    Memory: 2 bytes per parameter and 8 for each 256 of them.
    """
    import torch
    from bitsandbytes import optim

    base: Any = optim.PagedAdamW8bit if name == "paged-adamw-8bit" else optim.AdamW8bit

    class AdamW8bit(base):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Make what is missing of the state, then step.

            bitsandbytes makes it parameter by parameter between updates: where memory ran out, some would be updated twice.
            """
            for number, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is not None and not self.state[parameter]:
                        self._begin(group, parameter, number, index)
            return super().step(closure)

        def _begin(self, group: dict[str, Any], parameter: Tensor, number: int, index: int) -> None:
            try:
                self.init_state(group, parameter, number, index)
            except BaseException:
                self.state.pop(parameter, None)
                raise

        def adopt(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
            """Take over what `save_optimizer` kept of a parameter; it is copied.

            Raises:
                ValueError: where it is of another form than here.
            """
            number, index, group = next(
                (number, index, group)
                for number, group in enumerate(self.param_groups)
                for index, mine in enumerate(group["params"])
                if mine is parameter
            )
            self.state.pop(parameter, None)
            self._begin(group, parameter, number, index)
            mine = self.state[parameter]
            expected = saved_entries(mine)
            missing = next((kind for kind in expected if kind not in state), None)
            if missing is not None:
                raise ValueError(f"{missing} is missing")
            if parameter.device.type == "cuda":
                torch.cuda.synchronize(parameter.device)  # pages are filled with zeros by the GPU, and written to from here
            with torch.no_grad():
                for kind, value in expected.items():
                    if (state[kind].shape, state[kind].dtype) != (value.shape, value.dtype):
                        raise ValueError(f"{kind} is {list(state[kind].shape)}, not {list(value.shape)} of {value.dtype}")
                    if kind == "step":
                        mine[kind] = int(state[kind].item())
                    else:
                        mine[kind].copy_(state[kind])

        def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            """Make zeros for a moment of `p`."""
            make: Callable[[Tensor, torch.dtype], Tensor] = super().get_state_buffer
            return pages(make, p, dtype) if self.is_paged and p.numel() >= PAGED_FROM else make(p, dtype)

    made: Any = AdamW8bit(groups, **settings)
    made._cpu_paged_warned = True  # a CPU is refused; only a simulation's tensors say that they are on one
    optimizer: torch.optim.Optimizer = made
    return optimizer


def pages(make: Callable[[Tensor, torch.dtype], Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `make` makes in memory that is paged: it counts as the host's, where it can always go."""
    from hydra_ppo.runtime.host_tensors import count_as_host

    return count_as_host(make(like, dtype))


def saved_entries(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what of a parameter's state is saved: all but constant tables; a count of steps as a tensor."""
    import torch

    from hydra_ppo.training.away import TABLES

    return {
        kind: value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for kind, value in state.items()
        if kind not in TABLES
    }
