"""How factors act on an input: a handful of forms that hold every method of the library."""

from lowrank_jax.forms.adaptive_low_rank import AdaptiveLowRank
from lowrank_jax.forms.base import Call, Form, Leaf, Record, UnsupportedError, apply_rows, leaf_sharding, leaf_spec
from lowrank_jax.forms.bottleneck import Bottleneck, NonlinearBottleneck
from lowrank_jax.forms.branches import Branches
from lowrank_jax.forms.chain import Chain
from lowrank_jax.forms.conformer import ConformerBottleneck
from lowrank_jax.forms.dense import Dense, DenseUpdate
from lowrank_jax.forms.input_bottleneck import InputBottleneck
from lowrank_jax.forms.low_rank import LowRank
from lowrank_jax.forms.magnitude import Magnitude
from lowrank_jax.forms.quality_pair import QualityPair
from lowrank_jax.forms.random_bases import Entries, RandomBases
from lowrank_jax.forms.rescale import InputRescale, Rescale
from lowrank_jax.forms.rows import Rows
from lowrank_jax.forms.sparse import Sparse, SparseLowRank
from lowrank_jax.forms.tucker import Tucker

__all__ = [
    "AdaptiveLowRank",
    "Bottleneck",
    "Branches",
    "Call",
    "Chain",
    "ConformerBottleneck",
    "Dense",
    "DenseUpdate",
    "Entries",
    "Form",
    "InputBottleneck",
    "InputRescale",
    "Leaf",
    "LowRank",
    "Magnitude",
    "NonlinearBottleneck",
    "QualityPair",
    "RandomBases",
    "Record",
    "Rescale",
    "Rows",
    "Sparse",
    "SparseLowRank",
    "Tucker",
    "UnsupportedError",
    "apply_rows",
    "leaf_sharding",
    "leaf_spec",
]
