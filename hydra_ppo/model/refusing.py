"""What a module that is one base in several roles refuses of what torch offers every module."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import torch
from torch import nn

from hydra_ppo.errors import RoleError


class Refusing(nn.Module):
    """A module that keeps its types, and whose passes are methods of their own."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model to a device. Its types stay: adapters and heads are fp32, the base is of the type it was loaded in.

        Raises:
            RoleError: when asked for another type.
        """
        _, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            self._refuse_type(dtype)
        return super().to(*args, **kwargs)

    def _refuse_type(self, dtype: torch.dtype) -> NoReturn:
        raise RoleError(
            f"dtype={dtype} would round adapters and heads, which train in fp32; choose model.dtype when the model is loaded."
        )

    def half(self) -> Self:
        """Refuse, as `to` does."""
        self._refuse_type(torch.float16)

    def bfloat16(self) -> Self:
        """Refuse, as `to` does."""
        self._refuse_type(torch.bfloat16)

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: what a pass computes depends on the role, and on what is wanted of it."""
        raise RoleError(
            "forward: the shared base is one model in each role; call logprobs, values, rewards or hidden_states inside "
            "`with model.role(...)`, or make views (hydra_ppo.views), which are called as models are."
        )

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a module's forward pass is compiled, and the passes of roles are methods, so nothing would happen."""
        raise RoleError(
            "compile of the whole would change nothing, since the passes of roles are methods of it; compile its layers: "
            "for layer in model.architecture.layers: layer.compile()."
        )
