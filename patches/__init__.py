"""Puts a HydraModel into PPO code that already exists; one module per host, on top of the role views.

From outside: `trl.apply`, `swift.apply` and `llamafactory.apply`, each undone by its `with` block or by `undo()`;
`versions.HostError`; `verl`, which verl itself imports; the paths that `python -m hydra_ppo.patches.swift` and
`python -m hydra_ppo.patches.llamafactory` print.

Never: an import of hydra_ppo.training, which does what a host does here; an import of a host before its patch is asked for; a
change to a host that is not inert for models other than role views, or that is not undone.
"""
