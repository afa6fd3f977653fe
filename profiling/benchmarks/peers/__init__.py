"""Times and measures one PPO update of other PPO trainers beside ours: same model, same token counts, taking turns.

`run.py` is the driver. The `*_worker.py` files run as scripts, in the environment of the trainer they drive; that one may
lack this package, so they import their neighbours by bare name.
"""
