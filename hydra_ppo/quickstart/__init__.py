"""The whole of RLHF in minutes, without a download: a corpus with a gold scorer, and the run that shows everything.

From outside: `run` (the run), `corpus` (reviews, their tokenizer, `gold_score`).

Never: anything that another run needs.
"""
