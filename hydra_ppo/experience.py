"""The data of one rollout: named tensors, and how they are cut into minibatches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses joined, each row starting at column 0, padded on the right only.

    Causal attention needs no mask for such rows: what stands to the right of a token never reaches it. So no T x T mask
    is made, and padding cannot change a number.

    Attributes:
        input_ids: (B, T).
        prompt_lengths: (B,) tokens of each prompt, at least 1.
        response_ids: (B, R), right-padded.
        response_mask: (B, R) bool.
        trunk: (B, T, H) hidden states that enter the first layer above the trunk, where they are known already.
        lengths: tokens of each row, on the host; without them rows cannot be packed.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_mask: Tensor
    trunk: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def first(self, rows: int | None) -> Sequences:
        """Return the leading rows; all of them where `rows` is None."""
        return Sequences(
            self.input_ids[:rows],
            self.prompt_lengths[:rows],
            self.response_ids[:rows],
            self.response_mask[:rows],
            None if self.trunk is None else self.trunk[:rows],
            None if self.lengths is None else self.lengths[:rows],
        )

    def state_positions(self) -> Tensor:
        """Return (B, R) columns of the hidden state from which response token r is drawn: prompt_length - 1 + r."""
        steps = torch.arange(self.response_ids.shape[1], device=self.input_ids.device)
        positions = self.prompt_lengths[:, None] - 1 + steps
        return positions.clamp(max=self.input_ids.shape[1] - 1)

    def last_positions(self) -> Tensor:
        """Return (B,) columns of the last response token (of the last prompt token where there is no response)."""
        return self.prompt_lengths + self.response_mask.sum(dim=1) - 1


@dataclass
class Experience:
    """Prompts and responses of one rollout, before anything is known of them.

    Attributes:
        prompt_ids: (B, P), left-padded.
        prompt_mask: (B, P) bool.
        response_ids: (B, R), right-padded, end-of-sequence token included.
        response_mask: (B, R) bool.
        prompt_lengths, response_lengths: the same on the host, so that cutting rows to size waits for no device.
        trunk: (B, T, H) what `Sequences.trunk` is, rows starting at column 0; only where a model has a trunk.

    Memory: two (B, R) tensors and the prompts; nothing per vocabulary entry or hidden unit but the trunk, which is asked for.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    prompt_lengths: list[int]
    response_lengths: list[int]
    trunk: Tensor | None = None

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and response."""
        return [p + r for p, r in zip(self.prompt_lengths, self.response_lengths, strict=True)]

    def prompts(self) -> list[list[int]]:
        """Return the prompt tokens of each row on the host, padding left out."""
        ids = self.prompt_ids.tolist()
        return [row[len(row) - length :] for row, length in zip(ids, self.prompt_lengths, strict=True)]

    def responses(self) -> list[list[int]]:
        """Return the response tokens of each row on the host, padding left out."""
        ids = self.response_ids.tolist()
        return [row[:length] for row, length in zip(ids, self.response_lengths, strict=True)]

    def ended(self, eos_ids: Sequence[int]) -> list[bool]:
        """Return for each row whether its response ends with an end-of-sequence token."""
        return [bool(row) and row[-1] in eos_ids for row in self.responses()]

    def select(self, rows: Sequence[int]) -> Self:
        """Return the given rows, cut to the longest prompt and response among them."""
        prompt_lengths = [self.prompt_lengths[i] for i in rows]
        response_lengths = [self.response_lengths[i] for i in rows]
        index = torch.tensor(rows, device=self.response_ids.device)
        prompt_width, width = max(prompt_lengths), max(response_lengths)
        parts = self.parts()
        for name, value in parts.items():
            if isinstance(value, Tensor):
                value = value.index_select(0, index.to(value.device))
                if name.startswith("prompt"):
                    value = value[:, value.shape[1] - prompt_width :]
                elif name == "trunk":
                    value = value[:, : max(p + r for p, r in zip(prompt_lengths, response_lengths, strict=True))]
                elif value.dim() == 2 and name not in ("members", "features"):
                    value = value[:, :width]
                parts[name] = value
        parts |= {"prompt_lengths": prompt_lengths, "response_lengths": response_lengths}
        return type(self)(**parts)

    def sequences(self) -> Sequences:
        """Return the rows shifted to start at column 0, cut to the longest of them."""
        joined = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        padding = self.prompt_ids.shape[1] - self.prompt_mask.sum(dim=1, keepdim=True)  # (B, 1)
        columns = torch.arange(max(self.lengths), device=joined.device) + padding  # (B, T)
        input_ids = joined.gather(1, columns.clamp(max=joined.shape[1] - 1))
        trunk = None if self.trunk is None else self.trunk[:, : input_ids.shape[1]].to(joined.device)
        prompt_lengths = self.prompt_mask.sum(dim=1)
        return Sequences(input_ids, prompt_lengths, self.response_ids, self.response_mask, trunk, tuple(self.lengths))

    def split(self, rows: int, tokens: int | None = None) -> list[list[int]]:
        """Cut the rows into micro-batches of similar length.

        Args:
            rows: most rows of one micro-batch.
            tokens: most tokens of one, padding included; a single longer row still makes a micro-batch.

        Returns:
            Row numbers of each micro-batch, longest rows first, so that the peak comes at once and not after an hour.
        """
        return split_by_length(self.lengths, rows, tokens)

    def minibatches(self, epochs: int, size: int, generator: torch.Generator) -> Iterator[Self]:
        """Yield each epoch's minibatches of `size` rows, in a fresh random order; the last may be smaller."""
        for _ in range(epochs):
            order = torch.randperm(len(self), generator=generator).tolist()
            for start in range(0, len(order), size):
                yield self.select(order[start : start + size])

    def with_trunk(self, trunk: Tensor | None) -> Self:
        """Return the same rows with another trunk, or none."""
        return replace(self, trunk=trunk)

    def parts(self, kind: type[Experience] | None = None) -> dict[str, Any]:
        """Return the attributes by name, for what is made of the same rows; those of `kind` alone, or all. Copies no tensor."""
        return {item.name: getattr(self, item.name) for item in fields(kind or self)}

    @staticmethod
    def from_lists(
        prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device
    ) -> Experience:
        """Pad prompts on the left and responses on the right."""
        prompt_ids, prompt_mask = pad_rows(prompts, pad_id, "left", device)
        response_ids, response_mask = pad_rows(responses, pad_id, "right", device)
        return Experience(
            prompt_ids, prompt_mask, response_ids, response_mask, [len(p) for p in prompts], [len(r) for r in responses]
        )


@dataclass(kw_only=True)
class ScoredExperience(Experience):
    """What one rollout left, scored in all roles.

    Attributes:
        old_logprobs: (B, R) log-probs of the sampled tokens under the actor at sampling time, nats.
        sampler_logprobs: (B, R) what the sampler had, where old_logprobs were recomputed in a pass of their own.
        ref_logprobs: (B, R) the same under the reference.
        old_values: (B, R) the critic's values of the state before each token; zeros where there is no critic.
        scores: (B,) scores of the responses.
        after_last: (B,) the critic's values of the states after the last tokens, where they are wanted.
        members: (B, k) what each of several reward heads says; None where there is one.
        drift: mean and largest |sampler - pass| in nats per token, where it was measured on some rows.
        features: (B, H) fp32 the reward role's final states where scores are read, where a reward source asks for them.

    Memory: four more (B, R) tensors, five where log-probs were recomputed; features until the rewards are known.
    """

    old_logprobs: Tensor
    sampler_logprobs: Tensor | None = None
    ref_logprobs: Tensor
    old_values: Tensor
    scores: Tensor
    after_last: Tensor | None = None
    members: Tensor | None = None
    drift: tuple[float, float] | None = None
    features: Tensor | None = None

    def finished(self, advantages: Tensor, returns: Tensor) -> FinishedExperience:
        """Return the same rows with their advantages and returns, both (B, R), and without features, which no update reads."""
        return FinishedExperience(**(self.parts() | {"features": None}), advantages=advantages, returns=returns)


@dataclass(kw_only=True)
class FinishedExperience(ScoredExperience):
    """What the updates read.

    Attributes:
        advantages, returns: (B, R).

    Memory: two more (B, R) tensors.
    """

    advantages: Tensor
    returns: Tensor


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids (B, W) and mask (B, W) bool of rows padded on one side to the longest, W at least 1."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad_id] * left + list(row) + [pad_id] * right)
        mask.append([False] * left + [True] * len(row) + [False] * right)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def split_by_length(lengths: Sequence[int], rows: int, tokens: int | None = None) -> list[list[int]]:
    """Group row numbers, longest first, into groups of at most `rows` rows and `tokens` padded tokens."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else []
        if group and len(group) < rows and (tokens is None or lengths[group[0]] * (len(group) + 1) <= tokens):
            group.append(row)
        else:
            groups.append([row])
    return groups
