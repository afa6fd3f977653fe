"""AdamW whose moments live in host memory and come to the device one bucket of parameters at a time.

The arithmetic is that of `torch.optim.AdamW(fused=True)`, by the same kernel on the same numbers: the bits are the same.

On a GPU moments go back on a stream of their own while the next bucket comes. Three waits make that safe: a bucket leaves
after its kernel, what it lay in is filled again after it has left, and `step` returns after all have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hydra_ppo.runtime.host_tensors import empty_on_host
from hydra_ppo.training.packed import Layout

BUCKET_BYTES = 8 * 2**20
"""Bytes of moments that come to the device together; a parameter with more is a bucket of its own."""

ROOMS = 2
"""Buckets that are on the device at once: one is stepped while the other goes back or comes."""


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) with moments in host memory.

    Args:
        params: parameters, or groups of them with rates of their own.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.

    `state` has the entries of `torch.optim.AdamW`: `step` on the device, `exp_avg` and `exp_avg_sq` on the host. Like its
    fused kernel it takes a GradScaler's `grad_scale` and `found_inf` without a wait for the device.

    Memory: on the host two numbers per parameter, of its type, pinned beside a GPU; on the device 4 bytes per tensor, and
    during a step two rooms of `BUCKET_BYTES`, or of the largest parameter's moments where those are more.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._buckets: list[list[_Bucket]] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True  # what a GradScaler asks for

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as `torch.optim.Optimizer` does, and put them into buckets."""
        super().add_param_group(param_group)
        self._buckets.append(_in_buckets(self.param_groups[-1]["params"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = zip(self.param_groups, self._buckets, strict=True)
        todo = [(group, bucket) for group, buckets in pairs for bucket in buckets if bucket.with_gradient()]
        if not todo:
            return loss
        # Whatever can fail for want of memory comes before anything is changed, so that the step can be tried again.
        rooms = _make_rooms([bucket for _, bucket in todo])
        for _, bucket in todo:
            for parameter in bucket.with_gradient():
                bucket.begin(parameter, self.state)
        device = rooms[0].device
        back = torch.cuda.Stream(device) if device.type == "cuda" else None
        left: list[Any] = [None] * len(rooms)
        try:
            for number, (group, bucket) in enumerate(todo):
                turn = number % len(rooms)
                self._step_bucket(group, bucket, rooms[turn][: bucket.layout.bytes], back, left, turn)
        finally:
            if back is not None:
                back.synchronize()
        return loss

    def _step_bucket(
        self,
        group: dict[str, Any],
        bucket: _Bucket,
        room: Tensor,
        back: torch.cuda.Stream | None,
        left: list[Any],
        turn: int,
    ) -> None:
        """Bring the moments of a bucket into a room, step, and send them back on the stream `back`."""
        if back is not None and left[turn] is not None:
            torch.cuda.current_stream(room.device).wait_event(left[turn])
        room.copy_(bucket.host, non_blocking=True)
        views = dict(zip(bucket.parameters, bucket.pairs(room), strict=True))
        stepped = bucket.with_gradient()
        adamw(
            list(stepped),
            [parameter.grad for parameter in stepped if parameter.grad is not None],
            [views[parameter][0] for parameter in stepped],
            [views[parameter][1] for parameter in stepped],
            [],
            [self.state[parameter]["step"] for parameter in stepped],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if back is not None:
            back.wait_stream(torch.cuda.current_stream(room.device))
        with torch.cuda.stream(back) if back is not None else nullcontext():
            bucket.host.copy_(room, non_blocking=True)
            left[turn] = None if back is None else back.record_event()

    @torch.no_grad()
    def adopt(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over `step`, `exp_avg` and `exp_avg_sq` of a parameter; they are copied.

        Raises:
            ValueError: where they are not those of an AdamW, or of another shape than the parameter.
        """
        check_state(parameter, state)
        bucket = next(bucket for buckets in self._buckets for bucket in buckets if parameter in bucket)
        bucket.begin(parameter, self.state)
        for kind, value in self.state[parameter].items():
            value.copy_(state[kind])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` of this class or of `torch.optim.AdamW` returned; moments go to the host."""
        super().load_state_dict(state_dict)
        loaded = {parameter: dict(state) for parameter, state in self.state.items()}
        self.state.clear()
        for buckets in self._buckets:
            for bucket in buckets:
                bucket.forget()
        for parameter, state in loaded.items():
            self.adopt(parameter, state)


def check_state(parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a saved state is not what AdamW keeps of a parameter."""
    missing = next((kind for kind in ("step", "exp_avg", "exp_avg_sq") if kind not in state), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing")
    for kind, value in state.items():
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(f"{kind} is {list(value.shape)}, not {list(parameter.shape)}")


class _Bucket:
    """Parameters whose moments travel together, first and second in turn.

    Attributes:
        layout: of the moments.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.layout = Layout([moment for parameter in parameters for moment in _like_moments(parameter)])
        self._host: Tensor | None = None
        self._moments: list[tuple[Tensor, Tensor]] = []

    def __contains__(self, parameter: Tensor) -> bool:
        return any(parameter is mine for mine in self.parameters)

    @property
    def host(self) -> Tensor:
        """The moments, as bytes in host memory."""
        if self._host is None:
            # One byte, which looks like as many as are needed: only shape, type and device count.
            like = torch.empty(1, dtype=torch.uint8, device=self.parameters[0].device).expand(self.layout.bytes)
            self._host = empty_on_host(like).zero_()
            self._moments = self.pairs(self._host)
        return self._host

    def forget(self) -> None:
        """Begin anew."""
        self._host, self._moments = None, []

    def with_gradient(self) -> list[nn.Parameter]:
        """Return the parameters that have one."""
        return [parameter for parameter in self.parameters if parameter.grad is not None]

    def pairs(self, run: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return first and second moment of each parameter in a run of bytes."""
        views = self.layout.views(run)
        return list(zip(views[::2], views[1::2], strict=True))

    def begin(self, parameter: Tensor, state: Any) -> None:
        """Give a parameter that has none yet a state of zeros."""
        if state[parameter]:
            return
        moments = self._moments or self.pairs(self.host)
        first, second = next(pair for mine, pair in zip(self.parameters, moments, strict=True) if mine is parameter)
        steps = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state[parameter] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}


def _like_moments(parameter: nn.Parameter) -> list[Tensor]:
    """Return two tensors without memory, in shape, strides and type what AdamW makes for its moments."""
    return [torch.empty_like(parameter, device="meta")] * 2


def _in_buckets(parameters: Iterable[nn.Parameter]) -> list[_Bucket]:
    """Fill one bucket after the other, in order."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = Layout(_like_moments(parameter)).bytes
        if size > room or not buckets:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= size
    return [_Bucket(bucket) for bucket in buckets]


def _make_rooms(buckets: list[_Bucket]) -> list[Tensor]:
    """Return runs of bytes on the device that each hold any of the buckets.

    However few there are: what a step takes is then the same for every depth of a model, and can be foretold from a few layers.
    """
    device = buckets[0].parameters[0].device
    size = max(BUCKET_BYTES, *(bucket.layout.bytes for bucket in buckets))
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(ROOMS)]
