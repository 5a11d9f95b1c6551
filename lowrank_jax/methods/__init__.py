"""How factors are made: one paper, one small file."""

from lowrank_jax.methods.adalora import adalora
from lowrank_jax.methods.allora import allora
from lowrank_jax.methods.base import Method, build, method, names
from lowrank_jax.methods.bottleneck import bottleneck
from lowrank_jax.methods.chain import chain
from lowrank_jax.methods.colora import colora
from lowrank_jax.methods.conformer_adapter import conformer_adapter
from lowrank_jax.methods.corda import corda
from lowrank_jax.methods.dora import dora
from lowrank_jax.methods.dylora import dylora
from lowrank_jax.methods.flora import flora
from lowrank_jax.methods.full import full
from lowrank_jax.methods.hydra import hydra
from lowrank_jax.methods.ia3 import ia3
from lowrank_jax.methods.increlora import increlora
from lowrank_jax.methods.intrinsic import intrinsic
from lowrank_jax.methods.lamda import lamda
from lowrank_jax.methods.lamda_pp import lamda_pp
from lowrank_jax.methods.loldu import loldu
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.lora_ga import lora_ga
from lowrank_jax.methods.lora_sb import lora_sb
from lowrank_jax.methods.lora_xs import lora_xs
from lowrank_jax.methods.mos import mos
from lowrank_jax.methods.mosa import mosa
from lowrank_jax.methods.nola import nola
from lowrank_jax.methods.one_bit import one_bit, one_bit_packed
from lowrank_jax.methods.pego import pego
from lowrank_jax.methods.petalface import petalface
from lowrank_jax.methods.pissa import pissa
from lowrank_jax.methods.randlora import randlora
from lowrank_jax.methods.s2_lora import s2_lora
from lowrank_jax.methods.sara import sara
from lowrank_jax.methods.sltrain import sltrain
from lowrank_jax.methods.sora import sora
from lowrank_jax.methods.sparse_update import sparse_update
from lowrank_jax.methods.spiel import spiel
from lowrank_jax.methods.subspace_update import subspace_update
from lowrank_jax.methods.svfit import svfit
from lowrank_jax.methods.trainable_tokens import trainable_tokens
from lowrank_jax.methods.vera import vera
from lowrank_jax.methods.vida import vida
from lowrank_jax.methods.zero_i2v import zero_i2v

__all__ = [
    "Method",
    "adalora",
    "allora",
    "bottleneck",
    "build",
    "chain",
    "colora",
    "conformer_adapter",
    "corda",
    "dora",
    "dylora",
    "flora",
    "full",
    "hydra",
    "ia3",
    "increlora",
    "intrinsic",
    "lamda",
    "lamda_pp",
    "loldu",
    "lora",
    "lora_ga",
    "lora_sb",
    "lora_xs",
    "method",
    "mos",
    "mosa",
    "names",
    "nola",
    "one_bit",
    "one_bit_packed",
    "pego",
    "petalface",
    "pissa",
    "randlora",
    "s2_lora",
    "sara",
    "sltrain",
    "sora",
    "sparse_update",
    "spiel",
    "subspace_update",
    "svfit",
    "trainable_tokens",
    "vera",
    "vida",
    "zero_i2v",
]
