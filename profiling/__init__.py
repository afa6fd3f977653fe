"""Measures, simulates, compares and plans memory and speed; installed as hydra_ppo.profiling, and left out of training.

From outside: the entry points `PROFILE` and `PLAN` of `cli.main`, which `hydra-ppo` finds by name, and the commands
`python -m hydra_ppo.profiling.validate`, `.benchmarks.linear_cost`, `.benchmarks.ladder`, `.benchmarks.table` and
`.benchmarks.peers.run`. All rooms stand on `workload.Workload`: what is profiled, and its sizes.

Never: anything that a room of hydra_ppo itself would import. Work here may slow a step down or replace parts of torch while
it lasts; nothing that trains for its own sake depends on it.
"""
