"""Optax transforms of the methods, and what phases need of an optimizer."""

from lowrank_jax.optim.budget import cubic_budget, keep_best, share_out
from lowrank_jax.optim.freeze_rows import freeze_rows, frozen_rows
from lowrank_jax.optim.grow_triplets import grow_triplets
from lowrank_jax.optim.phases import carry_state, with_methods
from lowrank_jax.optim.prune_triplets import prune_triplets
from lowrank_jax.optim.soft_threshold import soft_threshold
from lowrank_jax.optim.update_used import update_used

__all__ = [
    "carry_state",
    "cubic_budget",
    "freeze_rows",
    "frozen_rows",
    "grow_triplets",
    "keep_best",
    "prune_triplets",
    "share_out",
    "soft_threshold",
    "update_used",
    "with_methods",
]
