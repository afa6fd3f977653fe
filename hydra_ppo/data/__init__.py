"""Rows of training data, and what they say as token ids: where an answer ends, how prompt and answer join.

From outside: `sources` (files and hub datasets), `rows` (`load_preferences`, `load_prompts`, the rows themselves), `ends` (the
tokens at which answers end), `text` (what sampled tokens say), `formats` (what a conversation is), `columns` (rows under our
names), `responses` (prompts with responses to score), `padding` (what a classifier's rows may be filled up with),
`tokenizer_files` (a tokenizer that transformers 4 and 5 load), `floor` (answers made worse on purpose).

Never: models; tensors.
"""
