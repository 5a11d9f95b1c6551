"""Optax transforms: of the methods, of gradients in subspaces, and what phases need of an optimizer."""

from lowrank_jax.optim.adam_8bit import scale_by_adam_8bit
from lowrank_jax.optim.budget import cubic_budget, keep_best, share_out
from lowrank_jax.optim.entry_swaps import swap_share
from lowrank_jax.optim.freeze_rows import freeze_rows, frozen_rows
from lowrank_jax.optim.frugal import frugal
from lowrank_jax.optim.galore import galore
from lowrank_jax.optim.grow_triplets import grow_triplets
from lowrank_jax.optim.layer_sampling import Layers, lisa
from lowrank_jax.optim.layerwise import ModelParts, layerwise_update
from lowrank_jax.optim.phases import carry_state, with_methods
from lowrank_jax.optim.precision import adaptive_precision
from lowrank_jax.optim.precision_state import mean_word_length, quantise_params, sparsity_penalty
from lowrank_jax.optim.prune_triplets import prune_triplets
from lowrank_jax.optim.soft_threshold import soft_threshold
from lowrank_jax.optim.spiel import reselect_entries
from lowrank_jax.optim.spiel_reselect import reselected, reselection_due, spiel_reselect
from lowrank_jax.optim.spiel_steps import scale_by_spiel
from lowrank_jax.optim.update_used import update_used

__all__ = [
    "adaptive_precision",
    "mean_word_length",
    "quantise_params",
    "sparsity_penalty",
    "Layers",
    "ModelParts",
    "carry_state",
    "cubic_budget",
    "freeze_rows",
    "frozen_rows",
    "frugal",
    "galore",
    "grow_triplets",
    "keep_best",
    "layerwise_update",
    "lisa",
    "prune_triplets",
    "reselect_entries",
    "reselected",
    "reselection_due",
    "scale_by_adam_8bit",
    "scale_by_spiel",
    "share_out",
    "soft_threshold",
    "spiel_reselect",
    "swap_share",
    "update_used",
    "with_methods",
]
