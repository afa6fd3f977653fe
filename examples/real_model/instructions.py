"""Everyday instructions, written anew: what people ask about things that are neither cheerful nor sad by themselves."""

from __future__ import annotations

import random

SYSTEM = "Answer in one or two short sentences."
"""Keeps answers near 32 tokens, and the system message that the template would add away."""

FRAMES = (
    "Tell me about {}.",
    "What is it like to spend an afternoon with {}?",
    "Why do people care about {}?",
    "Give me one tip on {}.",
    "Describe {} to a child.",
    "What do you think of {}?",
    "What can go wrong with {}?",
    "How would you begin a letter about {}?",
    "My neighbour keeps talking about {}. What should I say?",
    "What would you change about {}?",
)

TRAIN_TOPICS = (
    *("the bus to work", "old bicycles", "packed lunches", "a broken umbrella", "Monday mornings", "garden tools"),
    *("the public library", "cheap shoes", "long queues", "a rainy weekend", "tea with milk", "borrowed books"),
    *("doing the laundry", "the corner shop", "a slow computer", "wooden chairs", "a night train", "washing the dishes"),
    *("a new haircut", "shopping lists", "the weather report", "a school play", "cold soup", "house plants"),
    *("lost keys", "moving house", "a second-hand car", "the dentist", "early winter", "walking to school"),
    *("a paper map", "street cats", "office meetings", "leftover rice", "a wool scarf", "the local museum"),
)

HELD_OUT_TOPICS = (
    *("the evening news", "a leaking tap", "camping in autumn", "fresh bread", "a crowded market", "ironing shirts"),
    *("the post office", "an old radio", "board games", "waiting rooms", "a vegetable garden", "the last train home"),
    *("painting a fence", "a noisy fridge", "hand-written notes", "swimming lessons"),
)


def instructions(topics: tuple[str, ...], count: int, seed: int) -> list[str]:
    """Return so many different instructions about the topics, in an order that the seed decides."""
    every = [frame.format(topic) for frame in FRAMES for topic in topics]
    if count > len(every):
        raise SystemExit(f"count={count} is more than the {len(every)} instructions that there are; ask for fewer.")
    return random.Random(seed).sample(every, count)


def messages(instruction: str) -> list[dict[str, str]]:
    """Return an instruction as the chat that the model reads."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]
