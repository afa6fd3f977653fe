"""Everything that needs a GPU, in one command within a budget of seconds: equal roles, simulated peaks, speed, peers.

From outside: `python -m hydra_ppo.profiling.validate`. No other room imports this one; the tests on a GPU take `roles`
(`check_roles`, `BF16_TOLERANCES`), `speed` (`free`, `weights_made_on`) and `run.SMALL`.

Never: a part whose failure or length takes those after it along.
"""
