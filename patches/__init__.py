"""Puts a HydraModel into PPO code that already exists; one module per host."""
