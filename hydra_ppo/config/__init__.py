"""Settings: what they are, what they may be, and how they are read from YAML and written to it.

From outside: `settings` (every setting), `rewards` (those of reward sources), `fields` (how a setting is declared), `reading`
(values, YAML, checks), `paths` (paths among the settings, in the config of a run that may be moved).

Never: torch; `hydra-ppo --help` answers at once.
"""
