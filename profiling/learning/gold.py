"""The quickstart's gold scorer as a reward function, in a module that imports little: a process of its own runs it."""

from __future__ import annotations

from hydra_ppo.quickstart.corpus import gold_score


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """Score responses to prompts, in [-3, 3]."""
    return [gold_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
