"""Quickstart: the whole of RLHF on a laptop, without a download."""
