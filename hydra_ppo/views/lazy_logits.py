"""Logits that are not computed: what outside code gets where it expects a (B, T, V) tensor.

PPO code takes one number per token out of its logits: the log-probability of the token that was sampled. `LazyLogits` keeps
the hidden states and knows the operations by which such code gets there (slicing, temperature, log_softmax and gather,
cross_entropy, the entropy formulas); each ends in `token_logprobs`, exact gradients included, and no (B, T, V) tensor
exists. Any other operation gets the real logits: right, with the memory that they take, and a warning that names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.logprobs import TokenLogprobs, token_logprobs
from hydra_ppo.views.lazy import HANDLERS, Lazy, left_of_vocabulary

logger = logging.getLogger("hydra_ppo")

_warned: set[str] = set()


@dataclass(eq=False)
class LazyLogits(Lazy):
    """Scaled logits head(hidden) / temperature, shape (..., V), fp32.

    Args:
        hidden: (..., H) final hidden states.
        head: the output head.
        temperature: divides the logits.
    """

    hidden: Tensor
    head: LMHead
    temperature: float = 1.0

    dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self) -> None:
        self.head, self.temperature = self.head.unscaled(self.temperature)
        self._seen: TokenLogprobs | None = None  # of the last call, without a graph

    # -- what a tensor tells about itself --------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, temperature={self.temperature}, device={self.device})"

    # -- numbers ---------------------------------------------------------------------------------------------------------

    def token_logprobs(self, tokens: Tensor, entropy_grad: bool = False) -> TokenLogprobs:
        """Return log-probs of `tokens` (...), entropy and log norm, each of the shape of `tokens`."""
        found = token_logprobs(self.hidden, tokens, self.head, temperature=self.temperature, entropy_grad=entropy_grad)
        self._seen = TokenLogprobs(*(numbers.detach() for numbers in found))
        return found

    def selected(self, tokens: Tensor) -> Tensor:
        """Return the logits of `tokens` (...), differentiable. Memory: N x H of the head's rows."""
        rows = self.head.weight[tokens]  # (..., H)
        raw = torch.linalg.vecdot(self.hidden.to(rows.dtype), rows).float()
        if self.head.bias is not None:
            raw = raw + self.head.bias[tokens]
        if self.head.softcap is not None:
            raw = self.head.softcap * torch.tanh(raw / self.head.softcap)
        return raw / self.temperature

    def log_norm(self) -> Tensor:
        """Return log sum exp over the vocabulary, (...)."""
        if not self._wants_grad():
            return self._statistics().log_norm
        tokens = self._any_tokens()  # log norm = logit - log p, whatever the token
        return self.selected(tokens) - self.token_logprobs(tokens).logprobs

    def entropy(self) -> Tensor:
        """Return the entropy (...) in nats."""
        if not self._wants_grad():
            return self._statistics().entropy
        return self.token_logprobs(self._any_tokens(), entropy_grad=True).entropy

    def materialize(self, why: str = "materialize") -> Tensor:
        """Return the real logits (..., V), differentiable, for operation `why`."""
        if why not in _warned:
            _warned.add(why)
            logger.warning("logits of %s are computed in full for %s: it takes their memory", list(self.shape), why)
        raw = self.head.raw(self.hidden)
        if self.head.softcap is not None:
            raw = self.head.softcap * torch.tanh(raw / self.head.softcap)
        return raw / self.temperature

    def _wants_grad(self) -> bool:
        return torch.is_grad_enabled() and self.requires_grad

    def _any_tokens(self) -> Tensor:
        return torch.zeros(self.hidden.shape[:-1], dtype=torch.long, device=self.device)

    def _statistics(self) -> TokenLogprobs:
        if self._seen is None:
            with torch.no_grad():
                self.token_logprobs(self._any_tokens())
        assert self._seen is not None
        return self._seen

    # -- what leaves the vocabulary alone --------------------------------------------------------------------------------

    def _with(self, hidden: Tensor) -> LazyLogits:
        return replace(self, hidden=hidden)

    def __getitem__(self, index: Any) -> Any:
        parts, left = left_of_vocabulary(index, self.ndim)
        if left:
            return self._with(self.hidden[parts])
        return self.materialize("indexing the vocabulary")[index]

    def __iter__(self) -> Iterator[LazyLogits]:
        return (self[row] for row in range(len(self)))

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, int | float) and type(self) is LazyLogits:
            return replace(self, temperature=self.temperature * divisor)
        return super().__truediv__(divisor)

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, int | float) and type(self) is LazyLogits:
            return replace(self, temperature=self.temperature / factor)
        return _product(self, factor) or super().__mul__(factor)

    # Host code scales "in place"; the name that it holds is bound to the scaled object then.
    __itruediv__ = div = div_ = __truediv__
    __imul__ = __rmul__ = mul = mul_ = __mul__

    def _ident(self, *_: Any, **__: Any) -> LazyLogits:
        return self

    # Logits are computed in fp32 wherever the hidden states are, so casting and copying change nothing.
    float = contiguous = clone = to = type_as = _ident

    def detach(self) -> LazyLogits:
        lazy = self._with(self.hidden.detach())
        lazy._seen = self._seen
        return lazy

    def view(self, *shape: Any) -> Any:
        return self._reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        return self._reshape(*shape)

    def _reshape(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(sizes) > 1 and sizes[-1] == self.shape[-1]:
            return self._with(self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))
        return self.materialize("reshape across the vocabulary").reshape(sizes)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim < self.ndim - 1:
            return self._with(self.hidden.flatten(start_dim, end_dim))
        return self.materialize("flatten across the vocabulary").flatten(start_dim, end_dim)

    # -- what ends in numbers --------------------------------------------------------------------------------------------

    def log_softmax(self, dim: int = -1, dtype: Any = None) -> Any:
        if self._is_vocabulary(dim):
            return self._as(LazyLogprobs)
        return self.materialize("log_softmax").log_softmax(dim)

    def softmax(self, dim: int = -1, dtype: Any = None) -> Any:
        if self._is_vocabulary(dim):
            return self._as(LazyProbs)
        return self.materialize("softmax").softmax(dim)

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        if not self._is_vocabulary(dim):
            return self.materialize("logsumexp").logsumexp(dim, keepdim)
        return self.log_norm()[..., None] if keepdim else self.log_norm()

    def gather(self, dim: int, index: Tensor) -> Tensor:
        if self._is_vocabulary(dim) and index.shape == (*self.shape[:-1], 1):
            return self.selected(index[..., 0])[..., None]
        return self.materialize("gather of several tokens").gather(dim, index)

    def _is_vocabulary(self, dim: Any) -> bool:
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        return isinstance(dim, int) and dim % self.ndim == self.ndim - 1

    def _as(self, kind: type[LazyLogits]) -> LazyLogits:
        lazy = kind(self.hidden, self.head, self.temperature)
        lazy._seen = self._seen
        return lazy


class LazyLogprobs(LazyLogits):
    """Log-softmax over the vocabulary, (..., V)."""

    def gather(self, dim: int, index: Tensor) -> Tensor:
        if self._is_vocabulary(dim) and index.shape == (*self.shape[:-1], 1):
            return self.token_logprobs(index[..., 0]).logprobs[..., None]
        return self.materialize("gather of several tokens").gather(dim, index)

    def exp(self) -> LazyLogits:
        return self._as(LazyProbs)

    def log_softmax(self, dim: int = -1, dtype: Any = None) -> Any:
        return self if self._is_vocabulary(dim) else super().log_softmax(dim)

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        return self.materialize("logsumexp").logsumexp(dim, keepdim)

    def materialize(self, why: str = "materialize") -> Tensor:
        return super().materialize(why).log_softmax(dim=-1)


class LazyProbs(LazyLogits):
    """Softmax over the vocabulary, (..., V)."""

    def log(self) -> LazyLogits:
        return self._as(LazyLogprobs)

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        return self.materialize("logsumexp").logsumexp(dim, keepdim)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        return self._as(LazyLogprobs).gather(dim, index).exp()

    def materialize(self, why: str = "materialize") -> Tensor:
        return super().materialize(why).softmax(dim=-1)


@dataclass(eq=False)
class LazyProduct(Lazy):
    """Probabilities times the logits or log-probs of the same distribution, (..., V): what entropies are summed from."""

    factor: LazyLogits

    def sum(self, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
        if options or not self.factor._is_vocabulary(dim):
            real = self.materialize("sum")
            return real.sum(**options) if dim is None else real.sum(dim, keepdim, **options)
        total = -self.factor.entropy()
        if not isinstance(self.factor, LazyLogprobs):
            total = total + self.factor.log_norm()
        return total[..., None] if keepdim else total

    def materialize(self, why: str = "materialize") -> Tensor:
        return self.factor._as(LazyProbs).materialize(why) * self.factor.materialize(why)


def _product(left: LazyLogits, right: Any) -> LazyProduct | None:
    """Return probabilities times logits or log-probs of one distribution; None for any other product."""
    if not isinstance(right, LazyLogits) or right.hidden is not left.hidden or right.temperature != left.temperature:
        return None
    if isinstance(left, LazyProbs) == isinstance(right, LazyProbs):
        return None
    factor, probs = (right, left) if isinstance(left, LazyProbs) else (left, right)
    factor._seen = factor._seen or probs._seen
    return LazyProduct(factor)


# -- torch functions that know lazy tensors ------------------------------------------------------------------------------


def _method(name: str) -> Callable[..., Any]:
    def call(lazy: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(lazy, Tensor):  # tensor.op(lazy): the lazy one is not the first
            return NotImplemented
        return getattr(lazy, name)(*args, **kwargs)

    return call


def _softmax(name: str) -> Callable[..., Any]:
    def call(lazy: Any, dim: int = -1, _stacklevel: int = 3, dtype: Any = None) -> Any:
        return getattr(lazy, name)(dim)

    return call


def _gather(lazy: Any, dim: int, index: Tensor, **options: Any) -> Any:
    return NotImplemented if options else lazy.gather(dim, index)


def _multiply(left: Any, right: Any) -> Any:
    return left * right if isinstance(left, Lazy) else NotImplemented


def _sum(lazy: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    return lazy.sum(dim, keepdim) if isinstance(lazy, LazyProduct) and not options else NotImplemented


def _cat(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    same = all(
        type(t) is type(first) and t.head.weight is first.head.weight and t.temperature == first.temperature
        for t in tensors
        if isinstance(t, LazyLogits)
    )
    if not (same and all(isinstance(t, LazyLogits) for t in tensors) and dim % first.ndim < first.ndim - 1):
        return NotImplemented
    return first._with(torch.cat([t.hidden for t in tensors], dim=dim))


def _cross_entropy(
    logits: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = type(logits) is LazyLogits and weight is None and label_smoothing == 0.0 and logits.ndim <= 2
    if not plain or size_average is not None or reduce is not None or target.shape != logits.hidden.shape[:-1]:
        return NotImplemented
    return _reduced_nll(logits, target, ignore_index, reduction)


def _nll_loss(
    logprobs: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    plain = isinstance(logprobs, LazyLogprobs) and weight is None and logprobs.ndim <= 2
    if not plain or size_average is not None or reduce is not None:
        return NotImplemented
    return _reduced_nll(logprobs, target, ignore_index, reduction)


def _reduced_nll(lazy: LazyLogits, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    counts = target != ignore_index
    losses = -lazy.token_logprobs(target.masked_fill(~counts, 0)).logprobs.masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


HANDLERS |= {
    torch.log_softmax: _softmax("log_softmax"),
    torch.nn.functional.log_softmax: _softmax("log_softmax"),
    torch.softmax: _softmax("softmax"),
    torch.nn.functional.softmax: _softmax("softmax"),
    torch.logsumexp: _method("logsumexp"),
    torch.exp: _method("exp"),
    torch.gather: _gather,
    torch.mul: _multiply,
    torch.multiply: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.mul: _multiply,
    torch.sum: _sum,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.detach: _method("detach"),
    torch.nn.functional.cross_entropy: _cross_entropy,
    torch.nn.functional.nll_loss: _nll_loss,
}
