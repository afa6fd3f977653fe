"""The folder of a run: settings, metrics, samples, checkpoints, plots, and what it says of itself.

From outside: `run` (`Run`), `folder` (locks, state), `contents` (names of what is written, and nothing else is removed),
`checkpoint`, `inspect`, `plots`, `series`.

Never: models, trainers.
"""
