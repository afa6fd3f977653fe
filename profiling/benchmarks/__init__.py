"""What parts and whole steps cost here in time and bytes, next to what others would pay for the same.

From outside: commands alone, `linear_cost`, `ladder`, `table` and `peers.run` (each by `python -m`), and pytest
over the `bench_*.py` files, as `measure` says. No other room of the package imports this one; what checks the hosts borrows
`peers.environments`.

Never: an assertion about a time (the machine is not ours), or a comparison of things that do not compute the same; each
benchmark checks that first.
"""
