"""The maths of PPO and of reward models as pure functions of tensors.

Letters used here and everywhere else in the package: B batch rows, P prompt tokens, R response tokens,
T = P + R tokens, V vocabulary entries, H hidden units. Masks are bool, True where an entry counts.

From outside: `masked` (means, whitening), `penalties` (KL), `advantages`, `losses` (of actor and critic), `preferences` (of
reward models), `ensembles` (of several of them), `calibration` (of what they say), `reliability` (accuracy, length, best of
n), `clusters` (k-means), `trends` (of metrics, plain numbers).

Never: modules, optimizers, settings; in what a step of training calls, a tensor read on the host.
"""
