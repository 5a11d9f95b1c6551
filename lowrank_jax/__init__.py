"""Low-rank adaptation for JAX and Flax."""

from lowrank_jax import linen, methods, nnx, optim, peft
from lowrank_jax.adapters import Adapters, add, count, expand, init, join, mask, partition, stack, take
from lowrank_jax.folding import fold, merge, unfold
from lowrank_jax.methods import Method, build, full, lamda, lamda_pp, lora, lora_xs, method, pissa
from lowrank_jax.plan import Plan, on_layers, plan
from lowrank_jax.sites import Site, sites

__all__ = [
    "Adapters",
    "Method",
    "Plan",
    "Site",
    "add",
    "build",
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
    "pissa",
    "plan",
    "sites",
    "stack",
    "take",
    "unfold",
]
