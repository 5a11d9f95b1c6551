"""Low-rank adaptation for JAX and Flax."""

from lowrank_jax import linen, methods, nnx, optim, peft
from lowrank_jax.adapters import (
    Adapters,
    add,
    compact,
    count,
    expand,
    init,
    join,
    mask,
    partition,
    penalty,
    stack,
    take,
)
from lowrank_jax.collect import collect, contributions
from lowrank_jax.folding import fold, merge, unfold
from lowrank_jax.methods import Method, build, full, lamda, lamda_pp, lora, lora_xs, method, pissa
from lowrank_jax.plan import Plan, on_layers, plan
from lowrank_jax.sites import Site, sites
from lowrank_jax.statistics import Statistics

__all__ = [
    "Adapters",
    "Method",
    "Plan",
    "Site",
    "Statistics",
    "add",
    "build",
    "collect",
    "compact",
    "contributions",
    "count",
    "expand",
    "fold",
    "full",
    "init",
    "join",
    "lamda",
    "lamda_pp",
    "linen",
    "lora",
    "lora_xs",
    "mask",
    "merge",
    "method",
    "methods",
    "nnx",
    "on_layers",
    "optim",
    "partition",
    "peft",
    "penalty",
    "pissa",
    "plan",
    "sites",
    "stack",
    "take",
    "unfold",
]
