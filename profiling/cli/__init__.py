"""`hydra-ppo profile` and `hydra-ppo plan`: arguments, what the commands do, and the search for set-ups that fit.

From outside: `main.PROFILE` and `main.PLAN`, as entry points; `savings`, by `python -m`. No other room imports this one.

Never: a measurement of its own (`measuring`), a table or picture of what was measured (`reporting`), or torch before the
arguments are known to be good.
"""
