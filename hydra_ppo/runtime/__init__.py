"""What keeps a process alive and repeatable: stopping, memory that runs out, time limits, random sources, files.

From outside: `interruption`, `exhaustion`, `time_limit`, `host_memory`, `random_sources`, `random_states` (the same for
another process), `memory` (peaks), `announce` (what is being allocated), `host_tensors` (what is kept beside the device),
`files`, `recorder` (where metrics go), `output` (terminals that go away),
`tables` (terminals that are narrow).

Never: what is being computed.
"""
