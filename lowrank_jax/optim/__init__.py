"""Optax transforms of the methods, and what phases need of an optimizer."""

from lowrank_jax.optim.freeze_rows import freeze_rows, frozen_rows
from lowrank_jax.optim.phases import carry_state, with_methods

__all__ = ["carry_state", "freeze_rows", "frozen_rows", "with_methods"]
