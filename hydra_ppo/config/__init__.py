"""Settings: what they are, what they may be, and how they are read from YAML and written to it.

From outside: `settings` (every setting), `rewards` (those of reward sources), `reading` (values, YAML, checks), `writing` (YAML
with comments), `evidence` (where defaults come from), `paths` (paths among the settings, in the config of a run that may be
moved), `fields` (how a setting is declared).

Never: torch; `hydra-ppo --help` answers at once.
"""
