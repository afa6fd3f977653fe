"""Rows of training data, and what they say as token ids.

From outside: `sources` (files and hub datasets), `rows` (`load_preferences`, `load_prompts`, the rows themselves).

Never: models; tensors.
"""
