"""How factors act on an input: a handful of forms that hold every method of the library."""

from lowrank_jax.forms.base import Call, Form, Leaf, Record, UnsupportedError, apply_rows, leaf_spec
from lowrank_jax.forms.bottleneck import Bottleneck
from lowrank_jax.forms.chain import Chain
from lowrank_jax.forms.dense import Dense
from lowrank_jax.forms.low_rank import LowRank
from lowrank_jax.forms.sparse import Sparse
from lowrank_jax.forms.tucker import Tucker

__all__ = [
    "Bottleneck",
    "Call",
    "Chain",
    "Dense",
    "Form",
    "Leaf",
    "LowRank",
    "Record",
    "Sparse",
    "Tucker",
    "UnsupportedError",
    "apply_rows",
    "leaf_spec",
]
