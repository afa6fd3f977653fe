"""verl's jagged rows as the sequences of a HydraModel, and its numbers back at the places where verl looks for them.

A row of verl is a prompt and its response without padding; a number of token t stands one place before it, at t - 1, where
the model predicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.compute.logprobs import TokenLogprobs
from hydra_ppo.experience import Sequences
from hydra_ppo.patches.versions import HostError

UNSUPPORTED = {
    "calculate_sum_pi_squared": "needs whole rows of probabilities",
    "distillation_use_topk": "needs whole logits",
    "distillation_only": "needs whole logits",
    "enable_routing_replay": "is not known to the shared base",
}
"""What a batch may ask for and does not get."""


def refuse_batch(data: Any) -> None:
    """Refuse what a batch of verl asks for and this engine has no answer to.

    Raises:
        HostError: naming it.
    """
    for name, why in UNSUPPORTED.items():
        value = data.get(name, None)
        value = getattr(value, "data", value)
        if isinstance(value, bool) and value:
            raise HostError(f"{name}=True {why}, which the engine hydra does not make; use another strategy, or leave it out.")
    images = data.get("multi_modal_inputs", None)
    if images is not None and any(getattr(row, "data", row) for row in images):
        raise HostError("multi_modal_inputs are given, but all roles run on token ids; use a text model.")
    if not data["input_ids"].is_nested:
        raise HostError("input_ids is padded, but this engine takes rows without padding; use verl's own trainers.")


def response_lengths(data: Any) -> tuple[Tensor, Tensor]:
    """Return (B,) tokens of each prompt and of each response; without `prompts` all but the first token are the response."""
    total = data["input_ids"].offsets().diff()
    if "prompts" not in data or "responses" not in data:
        return torch.ones_like(total), total - 1
    prompts, responses = data["prompts"], data["responses"]
    if prompts.is_nested:
        found = prompts.offsets().diff(), responses.offsets().diff()
    else:
        mask, width = data["attention_mask"], prompts.shape[1]
        found = mask[:, :width].sum(dim=1), mask[:, width:].sum(dim=1)
    first, second = (lengths.to(total) for lengths in found)
    return first, second


class Rows:
    """The rows of one micro-batch.

    Args:
        data: TensorDict of verl, with jagged input_ids (B, j).

    Attributes:
        sequences: the same rows, padded on the right.
    """

    def __init__(self, data: Any) -> None:
        ids = data["input_ids"]
        self.offsets = ids.offsets()
        prompts, responses = response_lengths(data)
        lengths = self.offsets.diff()
        on_host = torch.stack([lengths, prompts, responses]).tolist()  # the one wait for the device
        if any(length != p + r or p < 1 for length, p, r in zip(*on_host, strict=True)):
            raise HostError("input_ids are not prompts followed by responses, of a token at least; check the data.")
        flat = ids.values().long()
        steps = torch.arange(max(on_host[0]), device=flat.device)
        places = (self.offsets[:-1, None] + steps).clamp(max=len(flat) - 1)
        padded = flat[places].masked_fill(steps >= lengths[:, None], 0)  # (B, T)
        steps = steps[: max(1, *on_host[2])]
        columns = (prompts[:, None] + steps).clamp(max=padded.shape[1] - 1)
        mask = steps < responses[:, None]
        self.sequences = Sequences(padded, prompts, padded.gather(1, columns), mask, None, tuple(on_host[0]))

    def back(self, numbers: Tensor) -> Tensor:
        """Return (B, R) numbers of the response tokens as verl wants them: jagged (B, j), zero where there is no response.

        Gradients pass.
        """
        sequences = self.sequences
        steps = torch.arange(numbers.shape[1], device=numbers.device)
        places = (self.offsets[:-1] + sequences.prompt_lengths - 1)[:, None] + steps
        flat = numbers.new_zeros(sum(sequences.lengths or ()))
        mask = sequences.response_mask
        return torch.nested.nested_tensor_from_jagged(flat.scatter(0, places[mask], numbers[mask]), self.offsets)


def temperatures_of(data: Any, rows: int) -> list[float]:
    """Return the temperature of each row.

    Raises:
        HostError: where one is not above 0.
    """
    given = data["temperature"]
    found = [float(t) for t in given.flatten().tolist()] if isinstance(given, Tensor) else [float(given)] * rows
    if len(found) != rows or not all(temperature > 0 for temperature in found):
        raise HostError(f"temperature={given!r} is not above 0 for each of {rows} rows, and log-probs are divided by it.")
    return found


def by_temperature(
    logprobs: Callable[[Sequences, float], TokenLogprobs], sequences: Sequences, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropy (B, R) of rows that were sampled at temperatures of their own, those alike together.

    Args:
        logprobs: of some rows at one temperature.
        sequences: B rows.
        temperatures: of each.
    """
    distinct = sorted(set(temperatures))
    if len(distinct) == 1:
        found = logprobs(sequences, distinct[0])
        return found.logprobs, found.entropy
    shape = sequences.response_ids.shape
    values, entropy = (torch.zeros(shape, device=sequences.input_ids.device) for _ in range(2))
    for temperature in distinct:
        rows = [row for row, own in enumerate(temperatures) if own == temperature]
        index = torch.tensor(rows, device=values.device)
        found = logprobs(_pick(sequences, rows, index), temperature)
        values, entropy = values.index_copy(0, index, found.logprobs), entropy.index_copy(0, index, found.entropy)
    return values, entropy


def _pick(sequences: Sequences, rows: Sequence[int], index: Tensor) -> Sequences:
    """Return some of the rows, as wide as they were."""
    tensors = (sequences.input_ids, sequences.prompt_lengths, sequences.response_ids, sequences.response_mask)
    lengths = None if sequences.lengths is None else tuple(sequences.lengths[row] for row in rows)
    return Sequences(*(tensor.index_select(0, index) for tensor in tensors), None, lengths)
