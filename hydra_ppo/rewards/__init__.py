"""What a score is made of: reward sources, their sum, normalising and penalties.

From outside: `scorer` (`Scorer`, `RunningMoments`, `load_function`).

Never: the shared base; what the reward head says comes in as numbers.
"""
