"""Puts HydraModel into PPO code that already exists."""
