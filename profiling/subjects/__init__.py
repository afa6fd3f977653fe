"""What is put under the tracker: the methods that Hydra is compared with, on random or fake weights, with their trainers.

From outside: `subjects` (`Builder`, `Models`), `baselines` (`METHODS`, `build`, `SeparateModels`), `fake` (`fake_tensors`,
`no_repetition`, `LeapingDecoder`), `shapes` (`model_config`, `HUB_NAMES`), `stand_ins` (`NoTokenizer`, `unused_settings`),
`ranks` (one process that takes itself for one of several).

Never: a count of bytes or seconds, or a trainer of its own: those of hydra_ppo.training are what is measured.
"""
