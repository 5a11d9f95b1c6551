"""How factors are made: one paper, one small file."""

from lowrank_jax.methods.base import Method, build, method, names
from lowrank_jax.methods.full import full
from lowrank_jax.methods.lamda import lamda
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.lora_xs import lora_xs
from lowrank_jax.methods.pissa import pissa

__all__ = ["Method", "build", "full", "lamda", "lora", "lora_xs", "method", "names", "pissa"]
