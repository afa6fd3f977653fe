"""What is sent for one row, and what is read from the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import NonFiniteError, ServerError

NEVER = -100.0
"""What is added to the logit of a token that is not to be drawn; the server takes no less."""
NONE = -9999.0
"""The log-prob that a server gives where it has minus infinity."""


@dataclass(frozen=True)
class Row:
    """One prompt on its way to a server.

    Attributes:
        prompt: token ids.
        seed: of its tokens.
        most: tokens that it may get.
        given: whether it gets that many, and nothing ends it.
    """

    prompt: Sequence[int]
    seed: int
    most: int
    given: bool = False


def request(row: Row, model: str, settings: RolloutSettings, eos_ids: Sequence[int], never: Sequence[int]) -> dict[str, Any]:
    """Return the request for a row: token ids in and out, and every default that a server might bring spelled out.

    Its own end tokens are switched off, so that ours alone end a response.
    """
    bias = {"logit_bias": {str(token): NEVER for token in never}} if never else {}
    stop = {"stop": list(settings.stop), "include_stop_str_in_output": True} if settings.stop and not row.given else {}
    return {
        "model": model,
        "prompt": list(row.prompt),
        "seed": row.seed,
        "max_tokens": row.most,
        "temperature": settings.temperature,
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "n": 1},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        "ignore_eos": True,
        "stop_token_ids": [] if row.given else list(eos_ids),
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        **stop,
        **bias,
    }


@dataclass(frozen=True)
class Reader:
    """Reads answers to rows, and refuses what no response can be made of.

    Attributes:
        settings: of the rollout.
        eos_ids: tokens that end a response.
        tokens: rows of the model's embedding.
        stopped: as of `sampling.sample`.
    """

    settings: RolloutSettings
    eos_ids: Sequence[int]
    tokens: int
    stopped: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None

    def read(self, answer: Any, row: Row, where: str) -> tuple[list[int], list[float]]:
        """Return token ids and log-probs of a response.

        Args:
            where: what the server is called in an error.

        Raises:
            ServerError: where the answer has another form, or is no whole response.
            NonFiniteError: where a log-prob is none.
        """
        ids, logprobs, reason = _parts(answer, row, where)
        strange = [i for i in ids if not isinstance(i, int) or not 0 <= i < self.tokens]
        if strange:
            raise ServerError(
                f"{where} gave a token that the model does not have ({strange[0]} of {self.tokens}); it serves another base."
            )
        if any(not isinstance(p, float | int) or not math.isfinite(p) or p <= NONE for p in logprobs):
            raise NonFiniteError(
                f"phase=rollout: log-probs of {where} are nan or infinite; lower optimizer.learning_rate or use a wider "
                "--dtype."
            )
        if row.given:
            return self._whole(ids, logprobs, row, where)
        ended = ids[-1] in self.eos_ids
        cut = self._cut(ids, where, by_string=reason == "stop" and not ended)
        if cut is None and not ended:
            self._whole(ids, logprobs, row, where)
        return ids[:cut], [float(p) for p in logprobs[:cut]]

    def _whole(self, ids: list[int], logprobs: list[float], row: Row, where: str) -> tuple[list[int], list[float]]:
        if len(ids) < row.most:
            raise ServerError(
                f"{where} ended a response after {len(ids)} of {row.most} tokens, where nothing of ours ends it; start it with "
                "--generation-config vllm, as hydra-ppo serve says."
            )
        return ids, [float(p) for p in logprobs]

    def _cut(self, ids: list[int], where: str, *, by_string: bool) -> int | None:
        """Return how many tokens there are to where a string that ends responses is complete; None where none is."""
        if self.stopped is None:
            return None
        so_far = [ids[:count] for count in range(1, len(ids) + 1)]
        found = self.stopped(so_far)
        cut = found.index(True) + 1 if True in found else None
        if cut is None and by_string:
            raise ServerError(
                f"{where} stopped at one of rollout.stop={list(self.settings.stop)} where our tokenizer reads none; serve the "
                "run's own tokenizer (--tokenizer)."
            )
        return cut


def _parts(answer: Any, row: Row, where: str) -> tuple[list[int], list[float], Any]:
    """Return tokens, log-probs and the reason of the end, as they came."""
    try:
        (choice,) = answer["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        prompt, reason = choice["prompt_token_ids"], choice["finish_reason"]
    except (KeyError, TypeError, ValueError):
        raise ServerError(
            f"{where} speaks another version: its answer lacks token_ids, prompt_token_ids or log-probs; use one that knows "
            "return_token_ids (tried: vLLM 0.32.0)."
        ) from None
    if prompt != list(row.prompt):
        raise ServerError(
            f"{where} went on from another prompt ({len(prompt)} tokens for {len(row.prompt)}); use its own base."
        )
    if not isinstance(ids, list) or not isinstance(logprobs, list) or not ids or len(ids) != len(logprobs):
        raise ServerError(f"{where} gave no whole response (finish_reason={reason!r}); start it again and go on with --resume.")
    if reason not in ("stop", "length"):
        raise ServerError(f"{where} broke a response off (finish_reason={reason!r}); start it again and go on with --resume.")
    return ids, logprobs, reason
