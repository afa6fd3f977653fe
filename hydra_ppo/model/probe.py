"""A model tried before it is used: whether its passes are what PPO on a shared base takes them for.

Nothing here knows a family by its name. Tokens-long passes are compared with one another, and what has to be equal is: a row
alone and beside a longer one, a token whatever comes after it, training mode and evaluation mode, an adapter of zeros and none,
a pass with its trunk put in and run, gradients with activations kept and recomputed. The decoding is tried by
`rollout.decoding`, before the first rollout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hydra_ppo.errors import HydraError, UnsupportedModelError
from hydra_ppo.model.adapters import adapter_parameters
from hydra_ppo.model.role_model import RoleModel

logger = logging.getLogger("hydra_ppo")

LENGTHS: dict[str, tuple[int, int]] = {"fast": (9, 5), "full": (192, 70)}
"""Tokens of a long row and a short one, by how thorough the check is."""

SAID = 1e-3
"""Dependence of a row on its neighbours, relative to the largest hidden state, that is said where it is accepted."""

FEW = 0.25
"""Share of tokens that may differ in half precision. Where experts are chosen, rounding may choose another one for a token; a
pass that is wrong is wrong nearly everywhere."""


def few_of(dtype: torch.dtype) -> float:
    """Return the share of tokens that may differ."""
    return 0.0 if dtype in (torch.float32, torch.float64) else FEW


def tolerance_of(dtype: torch.dtype, quantised: bool = False) -> float:
    """Return the largest difference of two passes, relative to the largest hidden state, that is rounding."""
    if quantised:
        return 0.1
    return {torch.float32: 1e-4, torch.float64: 1e-4}.get(dtype, 0.05)


def without_values(weight: Tensor) -> bool:
    """Return whether there is nothing to try: a tensor of shape alone, on the meta device or of a simulation."""
    return weight.device.type == "meta" or isinstance(weight, FakeTensor) or isinstance(weight.data, FakeTensor)


def probe_rows(lengths: tuple[int, int], vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the token ids of a long row (1, L) and a short one (1, S), spread over the vocabulary."""
    ids = [(7 + 31 * i * i + 5 * i) % max(vocabulary - 3, 1) + min(3, vocabulary - 1) for i in range(sum(lengths))]
    both = torch.tensor([ids], device=device) % vocabulary
    return both[:, : lengths[0]], both[:, lengths[0] :]


def probe(model: RoleModel, check: str, quantised: bool) -> None:
    """Try the passes of a model that was just built, and leave it as it was.

    Args:
        model: outside of any role.
        check: fast or full; what `LENGTHS` names.
        quantised: whether linear layers are, in 8 bits by batch.

    Memory: the activations of one row of 9 tokens (192 for `full`), and for a moment the gradients of the actor's adapter.

    Raises:
        UnsupportedModelError: naming what differs, how much, and the likely reason.
    """
    longest = getattr(model.architecture.config, "max_position_embeddings", None) or max(LENGTHS[check])
    long, short = LENGTHS[check] if longest >= LENGTHS[check][0] else LENGTHS["fast"]
    embeddings = model.architecture.input_embeddings.weight
    with as_one_line(model.causal_lm), _left_as_it_was(model):
        rows = probe_rows((long, short), model.architecture.output_embeddings.weight.shape[0], model.device)
        checks = _Checks(model, rows, tolerance_of(embeddings.dtype, quantised))
        checks.causality()
        checks.padding(by_batch=quantised)
        checks.adapters_of_zeros()
        checks.trunk()
        checks.modes_and_recomputing()


class _Checks:
    def __init__(self, model: RoleModel, rows: tuple[Tensor, Tensor], tolerance: float) -> None:
        self.model, self.tolerance = model, tolerance
        self.few = few_of(model.architecture.input_embeddings.weight.dtype)
        self.long, self.short = rows
        self.kind = type(model.causal_lm).__name__
        self.alone = self._states(self.long)

    @torch.no_grad()
    def _states(self, ids: Tensor) -> Tensor:
        return self.model.hidden_states(ids).float()

    def _same(self, found: Tensor, expected: Tensor, what: str, why: str) -> None:
        """Compare (T, H) with (T, H), token by token."""
        scale = expected.abs().max().clamp(min=1e-6)
        away = (found - expected).abs().amax(dim=-1) / scale  # (T,)
        if not away.isfinite().all() or (away > self.tolerance).float().mean().item() > self.few:
            raise UnsupportedModelError(
                f"model={self.kind}: {what} (relative difference {away.max().item():.2g}, {self.tolerance:g} would be "
                f"rounding); {why}, or set model.check=off if you know better."
            )

    def causality(self) -> None:
        other = self.long.clone()
        other[:, -1] = self.short[:, 0] if self.short[0, 0] != self.long[0, -1] else self.short[:, 1]
        self._same(
            self._states(other)[0, :-1],
            self.alone[0, :-1],
            "a token sees those after it",
            "a policy must not; use a decoder-only causal LM with causal attention",
        )

    def padding(self, by_batch: bool) -> None:
        """A row alone against the row beside another.

        Args:
            by_batch: some dependence is known and accepted, and its size said: with int8 on a GPU a column of activations is
                kept in 16 bits where any row of the batch has an outlier in it (LLM.int8, Dettmers et al. 2022, section 3.2).
        """
        padded = torch.zeros_like(self.long)
        short = self.short.shape[1]
        padded[:, :short] = self.short
        both = self._states(torch.cat([self.long, padded]))
        beside, alone = torch.cat([both[0], both[1, :short]]), torch.cat([self.alone[0], self._states(self.short)[0]])
        away = ((beside - alone).abs().max() / alone.abs().max().clamp(min=1e-6)).item()
        if by_batch and away > SAID:
            logger.warning(
                "int8 chooses by batch which columns of activations are rounded, so a row's numbers depend on the rows beside "
                "it: by %.2g of the largest hidden state in a trial; model.quantization=nf4 has no such effect",
                away,
            )
        self._same(
            beside,
            alone,
            "a row depends on the rows beside it and on the padding after it",
            "likely a layer that mixes rows or takes padding for text; use another model",
        )

    def adapters_of_zeros(self) -> None:
        """An adapter whose second half is zeros adds nothing, on whatever way a pass takes."""
        for role in self.model.trainable_roles:
            name = self.model.roles[role].adapter
            if name is None:
                continue
            with self.model.role(role):
                halves = [p for key, p in adapter_parameters(self.model.base, name).items() if "lora_B" in key]
                held = [half.detach().clone() for half in halves]
                try:
                    for half in halves:
                        half.data.zero_()
                    found = self._states(self.long)
                finally:
                    for half, was in zip(halves, held, strict=True):
                        half.data.copy_(was)
            self._same(
                found[0],
                self.alone[0],
                f"adapter {name!r} changes the pass with weights of zero",
                "it does something that this project does not compute; use a plain LoRA",
            )
            return  # the others are of the same kind

    def trunk(self) -> None:
        if self.model.trunk is None:
            return
        remedy = "set model.trunk_layers=0"
        with torch.no_grad(), self.model.taking_trunk() as plain:
            self.model.hidden_states(self.long)
        for role in self.model.trainable_roles:
            with self.model.role(role), torch.no_grad():
                with self.model.taking_trunk() as taken:
                    expected = self.model.hidden_states(self.long).float()
                found = self.model.hidden_states(self.long, taken[0]).float()
            self._same(taken[0][0], plain[0][0], "what leaves the trunk is another thing in another role", remedy)
            self._same(
                found[0],
                expected[0],
                f"layers above the trunk do not compute the same when the {self.model.trunk_layers} below are left out",
                remedy,
            )

    def modes_and_recomputing(self) -> None:
        """Training mode against evaluation mode, and the actor's gradients with and without recomputing activations."""
        model = self.model
        role = next((role for role in model.trainable_roles if model.roles[role].adapter is not None), None)
        before = model.checkpointing
        try:
            model.train()
            self._same(
                self._states(self.long)[0],
                self.alone[0],
                "training mode and evaluation mode give different numbers",
                "likely noise that its config sets (router jitter, dropout); set it to 0 in config.json",
            )
            if role is None:
                return
            kept = self._gradients(role, False)
            if not kept.any():
                raise UnsupportedModelError(
                    f"model={self.kind}: no gradient reaches adapter {model.roles[role].adapter!r}, whose layers are not "
                    "those that compute; set lora.target_modules to such as do, or use another model."
                )
            again = self._gradients(role, True)
        finally:
            model.eval()
            model.enable_checkpointing(before)
        self._same(
            again,
            kept,
            "gradients differ where activations are recomputed",
            "likely a layer that changes its state in a pass; set model.gradient_checkpointing=false",
        )

    def _gradients(self, role: str, recomputing: bool) -> Tensor:
        """Return (1, N) gradients of the adapter's second halves, which have some whatever the first are."""
        model = self.model
        name = model.roles[role].adapter
        assert name is not None
        model.enable_checkpointing(recomputing)
        wanted = [p for key, p in adapter_parameters(model.base, name).items() if "lora_B" in key]
        with model.role(role), torch.enable_grad():
            hidden = model.hidden_states(self.long).float()
            self._states(self.short)  # another pass lies between forward and backward, as the critic's does
            weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
            if not hidden.requires_grad:
                return torch.zeros(1, len(wanted), device=hidden.device)
            found = torch.autograd.grad((hidden * weights).sum(), wanted, allow_unused=True)
        return torch.stack([g.float().norm() if g is not None else hidden.new_zeros(()) for g in found])[:, None].detach()


@contextmanager
def as_one_line(causal_lm: nn.Module) -> Iterator[None]:
    """Turn whatever a pass raises into one line with the model's class.

    Raises:
        UnsupportedModelError: which names the error.
    """
    try:
        yield
    except (HydraError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise UnsupportedModelError(
            f"model={type(causal_lm).__name__} cannot be a shared base: a pass over a few tokens raises "
            f"{type(error).__name__} ({line}); use one of the supported families, or another model.attention."
        ) from error


@contextmanager
def _left_as_it_was(model: RoleModel) -> Iterator[None]:
    """Give back random numbers, mode and gradients' switches."""
    training, state = model.training, torch.random.get_rng_state()
    model.eval()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        model.train(training)
