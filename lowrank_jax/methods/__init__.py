"""How factors are made: one paper, one small file."""

from lowrank_jax.methods.base import Method, build, method, names
from lowrank_jax.methods.chain import chain
from lowrank_jax.methods.full import full
from lowrank_jax.methods.lamda import lamda
from lowrank_jax.methods.lamda_pp import lamda_pp
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.lora_xs import lora_xs
from lowrank_jax.methods.pissa import pissa

__all__ = ["Method", "build", "chain", "full", "lamda", "lamda_pp", "lora", "lora_xs", "method", "names", "pissa"]
