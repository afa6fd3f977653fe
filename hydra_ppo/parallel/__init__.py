"""The processes of one run on several GPUs: who does what, sums over all of them, and agreement before each.

From outside: `environment` (what torchrun tells a process, without torch), `world` (`World`, `ALONE`), `joining`
(`join`), `dealing`.

Never: a model, a trainer, or a file of a run.
"""
