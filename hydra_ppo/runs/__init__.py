"""The folder of a run: settings, metrics, samples, checkpoints, plots, and what it says of itself.

From outside: `run` (`Run`), `folder` (names, locks, state), `checkpoint`, `inspect`, `plots`.

Never: models, trainers.
"""
