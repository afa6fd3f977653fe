"""Reward heads that were trained on stored states: their folder, and what they say of states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_ppo.algorithms.ensembles import combine_members
from hydra_ppo.config.rewards import RewardSource
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.origin import Origin
from hydra_ppo.rewards.ensembles import disagreement_parts
from hydra_ppo.rewards.numbers import Judgement
from hydra_ppo.rewards.one_pass import pessimistic_scores
from hydra_ppo.runtime.files import irregular, read_regular, write_whole

Kind = Literal["linear", "mlp", "one-pass"]
TENSORS, ABOUT = "heads.safetensors", "heads.json"
FORMAT = 1


@dataclass(frozen=True)
class StoredHeads:
    """k heads on final states, each a stack of linear layers with ReLU between them.

    A member's score is f((state - center) / scale) - offset. Pairs leave each member's zero free, so offset is its mean over
    the states that it was trained on: without that, members would seem to disagree where they only begin elsewhere.

    Attributes:
        kind: what it was trained as; `one-pass` has one linear member and its uncertainty.
        layers: weight (k, out, in) and bias (k, out) of each, fp32; the last has one output.
        center, scale: (H,) of the states.
        offset: (k,).
        inverse: (H, H) P of a one-pass head, in the scaled states; None elsewhere.
        origin: what the states came of.
        measured: what training said of them; plain values.

    Memory: the weights, k * (H * 1024 + 1024 * 512) fp32 numbers for the default mlp; H^2 more for one-pass.
    """

    kind: Kind
    layers: tuple[tuple[Tensor, Tensor], ...]
    center: Tensor
    scale: Tensor
    offset: Tensor
    inverse: Tensor | None
    origin: Origin
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """k."""
        return len(self.offset)

    def scaled(self, states: Tensor) -> Tensor:
        """Return (B, H) fp32 what the layers read."""
        return (states.to(self.center.device, torch.float32) - self.center) / self.scale

    @torch.no_grad()
    def members(self, states: Tensor) -> Tensor:
        """Return (B, k) what each member says of states (B, H)."""
        return stacked(self.layers, self.scaled(states)[None].expand(self.count, -1, -1)).T - self.offset

    def to(self, device: torch.device) -> StoredHeads:
        """Return the same heads on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("center", "scale", "offset")}
        inverse = None if self.inverse is None else self.inverse.to(device)
        layers = tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers)
        return replace(self, layers=layers, inverse=inverse, **moved)


def stacked(layers: Sequence[tuple[Tensor, Tensor]], inputs: Tensor) -> Tensor:
    """Return (k, B) what k stacks of linear layers with ReLU between make of inputs (k, B, H)."""
    hidden = inputs
    for number, (weight, bias) in enumerate(layers):
        hidden = torch.baddbmm(bias[:, None], hidden.relu() if number else hidden, weight.transpose(1, 2))
    return hidden[..., 0]


class HeadSource:
    """Heads as a reward source.

    Args:
        source: names their folder, and how members are combined.
        device: where they compute.

    Attributes:
        heads: as they were read.

    Raises:
        ConfigError: where the folder is not theirs, or they cannot be combined so.
    """

    def __init__(self, source: RewardSource, device: torch.device) -> None:
        assert source.target is not None
        self.source, self.heads = source, read_heads(Path(source.target)).to(device)
        kind, count = self.heads.kind, self.heads.count
        if source.aggregate == "pessimism" and kind != "one-pass":
            raise ConfigError(
                f"aggregate='pessimism' needs a one-pass head, target={source.target!r} holds {kind} ones; choose variance or "
                "lcb, or train with --kind one-pass."
            )
        if source.aggregate in ("variance", "lcb") and count < 2:
            raise ConfigError(
                f"aggregate={source.aggregate!r} needs two members or more, target={source.target!r} holds one; use mean, or "
                "train with --members."
            )

    @torch.no_grad()
    def __call__(self, states: Tensor, prompts: Sequence[str]) -> Judgement:
        """Return scores of responses, and how far several members are apart; of pessimism `spread` is the uncertainty.

        Args:
            states: (B, H) where scores are read.
            prompts: of each response; those with the same text are held against each other by `pessimism`.
        """
        members, aggregate, coef = self.heads.members(states), self.source.aggregate, self.source.aggregate_coef
        if aggregate != "pessimism":
            return Judgement(
                combine_members(members, aggregate, coef), disagreement_parts(members if self.heads.count > 1 else None)
            )
        assert self.heads.inverse is not None
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        groups = torch.tensor([numbers[prompt] for prompt in prompts], device=members.device)
        phi = self.heads.scaled(states)
        off = -pessimistic_scores(torch.zeros_like(members[:, 0]), phi, self.heads.inverse, groups, 1.0)
        return Judgement(members[:, 0] - coef * off, {"spread": off})


def write_heads(heads: StoredHeads, folder: Path) -> None:
    """Write heads.safetensors, then heads.json: a folder that has the latter is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    tensors = {"center": heads.center, "scale": heads.scale, "offset": heads.offset}
    for number, (weight, bias) in enumerate(heads.layers):
        tensors |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
    if heads.inverse is not None:
        tensors["inverse"] = heads.inverse
    save_file({name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})
    about = {"format": FORMAT, "kind": heads.kind, "members": heads.count, "measured": heads.measured}
    write_whole(folder / ABOUT, json.dumps(about | {"origin": heads.origin.as_values()}, indent=2) + "\n")


def read_heads(folder: Path) -> StoredHeads:
    """Read what `write_heads` wrote.

    Raises:
        ConfigError: where the folder is none, not whole, or its tensors do not fit together.
    """
    place = f"heads={str(folder)!r}"
    about = read_about(folder)
    if (strange := irregular(folder)) is not None:
        raise ConfigError(f"{place} holds {strange!r}, which is neither file nor folder; remove it.")
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{place} cannot be read ({' '.join(str(error).split())[:120]}); train them again.") from error
    origin, kind = Origin.read(about.get("origin"), place), about["kind"]
    layers: list[tuple[Tensor, Tensor]] = []
    while (name := f"layers.{len(layers)}") and f"{name}.weight" in tensors and f"{name}.bias" in tensors:
        layers.append((tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sound = layers and found == _shapes(kind, about["members"], layers, origin.hidden_size)
    sound = sound and (kind == "mlp") != (len(layers) == 1) and all(tensor.isfinite().all() for tensor in tensors.values())
    if not sound or not (tensors["scale"] > 0).all():
        raise ConfigError(f"{place} holds no tensors of {about['members']} heads of kind {kind!r}; train them again.")
    parts = {name: tensors[name] for name in ("center", "scale", "offset")}
    return StoredHeads(kind, tuple(layers), **parts, inverse=tensors.get("inverse"), origin=origin, measured=about["measured"])


def _shapes(kind: Kind, members: int, layers: Sequence[tuple[Tensor, Tensor]], hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that all tensors must have for the layers to follow each other."""
    shapes: dict[str, tuple[int, ...]] = {"center": (hidden,), "scale": (hidden,), "offset": (members,)}
    if kind == "one-pass":
        shapes["inverse"] = (hidden, hidden)
    width = hidden
    for number, (_, bias) in enumerate(layers):
        out = 1 if number == len(layers) - 1 else bias.shape[-1] if bias.dim() else 0
        shapes |= {f"layers.{number}.weight": (members, out, width), f"layers.{number}.bias": (members, out)}
        width = out
    return shapes


def read_about(folder: Path) -> dict[str, Any]:
    """Return what heads.json says.

    Raises:
        ConfigError: where there is none, or of another form.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise ConfigError(f"heads={str(folder)!r} holds no {ABOUT}; name a folder that hydra-ppo heads wrote.")
    try:
        about = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); train the heads again.") from error
    sound = isinstance(about, dict) and about.get("format") == FORMAT and about.get("kind") in get_args(Kind)
    if not sound or not isinstance(about.get("members"), int) or not isinstance(about.get("measured"), dict):
        raise ConfigError(f"{path} is not of this version; train the heads again.")
    return dict(about)
