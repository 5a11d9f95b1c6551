"""Directions for several objectives at once, from their gradients: ParetoDA (arXiv 2112.04137) and MGDA."""

from lowrank_jax.pareto.direction import (
    ParetoDirection,
    descent_weights,
    gradient_gram,
    guide_weights,
    pareto_direction,
)
from lowrank_jax.pareto.simplex import linear_program, min_norm_weights

__all__ = [
    "ParetoDirection",
    "descent_weights",
    "gradient_gram",
    "guide_weights",
    "linear_program",
    "min_norm_weights",
    "pareto_direction",
]
