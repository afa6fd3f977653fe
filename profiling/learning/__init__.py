"""Whether sharing a base costs quality: every method trained on the quickstart's task and judged by its gold scorer.

From outside: `compare` (`compare_learning`, `learning_table`, `Outcome`), `setups` (settings of PPO), `picture.draw_trunks`,
`overoptimisation` (`over_optimise`, `verdict`: whether the monitor sees a score that is gamed in time), with `gold`;
`reward_models` (ensembles, losses, floor pairs, heads on stored states).

Never: peaks of memory and rates (`measuring`, `benchmarks`), or a task of its own: corpus and scorer are the quickstart's.
"""
