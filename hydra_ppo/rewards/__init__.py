"""What a score is made of: reward sources, their sum, normalising and penalties.

From outside: `scorer` (`Scorer`, `Scores`, `RunningMoments`, `check_source`), `responses` (what sources are given),
`isolated` (which file a function is of, in its process), `stored_heads` (heads trained on stored states), `features` (stored
states), `head_training`, `logistic` (linear heads), `one_pass` (a head that sees each pair once), `querying`, `self_labels`,
`numbers`, `ensembles` (whether a model has the members that settings ask for).

Never: the shared base; what the reward head says comes in as numbers.
"""
