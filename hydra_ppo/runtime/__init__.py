"""What keeps a process alive and repeatable: stopping, memory that runs out, time limits, random sources, files.

From outside: `interruption`, `exhaustion`, `time_limit`, `host_memory`, `random_sources`, `memory` (peaks), `announce` (what
is being allocated), `files`, `recorder` (where metrics go).

Never: what is being computed.
"""
