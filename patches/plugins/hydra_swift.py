"""The file for ms-swift's --external_plugins; `python -m hydra_ppo.patches.swift` prints its path."""

from hydra_ppo.patches.swift import apply

apply()
