"""Times and measures one PPO update of other PPO trainers beside ours: same model, same token counts, taking turns.

`run.py` is the driver. The `*_worker.py` files run as scripts, in the environment of the trainer they drive; that one may
lack this package, so they import their neighbours by bare name.

From outside: `python -m hydra_ppo.profiling.benchmarks.peers.run`; `environments` (`Environment`, `build_environment`,
`install_beside`) and `load.undisturbed`.

Never: in `worker` and `workloads` an import of this package, and in the driver one of a peer. `workloads` stays with the
standard library.
"""
