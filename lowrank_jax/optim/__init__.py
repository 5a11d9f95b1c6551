"""Optax transforms of the methods, and what phases need of an optimizer."""

from lowrank_jax.optim.freeze_rows import freeze_rows, frozen_rows

__all__ = ["freeze_rows", "frozen_rows"]
