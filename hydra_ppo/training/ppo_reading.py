"""Responses of a rollout as reward sources and people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.data.text import StopStrings, answer_texts
from hydra_ppo.experience import Experience
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reading:
    """Turns the tokens of responses into what is read of them.

    Args:
        tokenizer: of the policy.
        config: which special tokens are shown, and which strings end a response.
        eos_ids: tokens that end a response.

    Attributes:
        stop: finds the strings that end a response; None where there are none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PPOConfig, eos_ids: Sequence[int]) -> None:
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.shows = config.data.special_tokens == "show"
        self.stop = StopStrings(tokenizer, config.rollout.stop) if config.rollout.stop else None

    def ended(self, experience: Experience) -> list[bool]:
        """Return for each response whether it came to its end: an end token, or a string that stops it."""
        ended = experience.ended(self.eos_ids)
        if self.stop is not None:
            ended = [a or b for a, b in zip(ended, self.stop(experience.responses()), strict=True)]
        return ended

    def texts(self, experience: Experience, show: bool = False, ends: Sequence[int] = ()) -> list[str]:
        """Return what each response says, special tokens shown or hidden, `ends` left out at its end."""
        return answer_texts(self.tokenizer, experience.prompts(), experience.responses(), show_special=show, ends=ends)

    def read(self, experience: Experience) -> list[str]:
        """Return what reward sources read."""
        return self.texts(experience, self.shows, self.eos_ids)

    def responses(self, experience: Experience, rows: Sequence[PromptRow]) -> Responses:
        """Return what reward sources are given."""
        both = zip(experience.prompts(), experience.responses(), strict=True)
        spelled = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return Responses(
            prompts=[row.text for row in rows],
            texts=self.read(experience),
            conversations=[row.messages for row in rows],
            columns=[row.columns for row in rows],
            ended=self.ended(experience),
            queries=self.tokenizer.batch_decode([[*prompt, *response] for prompt, response in both], **spelled),
            begin=self.tokenizer.bos_token,
        )

    def samples(self, experience: Experience, rows: Sequence[PromptRow], scores: Scores, most: int) -> list[dict[str, Any]]:
        """Return the first `most` responses with their scores, for people."""
        texts = self.texts(experience, show=True, ends=self.eos_ids)
        each = list(zip(rows, texts, scores.total, scores.rows(), strict=True))[:most]
        return [{"prompt": row.text, "response": text, "score": score, "rewards": parts} for row, text, score, parts in each]
