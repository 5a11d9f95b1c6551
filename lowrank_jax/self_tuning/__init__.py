"""Self-Tuning Networks: layers that respond to hyper-parameters, so that validation data can tune these while the network trains.

Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions (arXiv 1903.03088).
"""

from lowrank_jax.self_tuning.hyper_parameters import (
    HyperParameters,
    Range,
    constrain,
    entropy,
    hyper_parameters,
    perturb,
    unconstrain,
)
from lowrank_jax.self_tuning.layers import HyperConv, HyperDense
from lowrank_jax.self_tuning.steps import SelfTuning, SelfTuningState, is_validation_step, self_tuning

__all__ = [
    "HyperConv",
    "HyperDense",
    "HyperParameters",
    "Range",
    "SelfTuning",
    "SelfTuningState",
    "constrain",
    "entropy",
    "hyper_parameters",
    "is_validation_step",
    "perturb",
    "self_tuning",
    "unconstrain",
]
