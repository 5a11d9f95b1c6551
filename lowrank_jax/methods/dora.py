"""DoRA: a weight taken apart into the lengths of its columns, trained as they are, and their directions, trained by a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank, Magnitude
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    method,
    scaling,
)
from lowrank_jax.methods.lora_pair import pair_leaves, zero_b
from lowrank_jax.methods.ranks import Rank, largest
from lowrank_jax.sites import Site


@method
def dora(
    rank: Rank = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    rank_stabilised: bool = False,
    norm: Literal["constant", "differentiated"] = "constant",
) -> Method:
    """DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353).

    ``y = x W magnitude / ||W|| + bias`` with ``W = K + s a b``, norms over ``n_in`` (one for each output); ``a [n_in, r]``,
    ``b [r, n_out]`` and ``magnitude [n_out]`` are trained. ``magnitude`` starts at ``||K||`` and ``b`` at zero, so the output starts at
    the base's. For small ranks, where LoRA cannot change a column's length without turning it; it costs one more product ``K^T a`` for
    each use of the weight, and merges.
    Count: ``r * (n_in + n_out) + n_out``.

    Two things are as in PEFT: the bias is not scaled, and ``magnitude`` is what its files call ``lora_magnitude_vector``. One is not:
    where PEFT drops elements of the input it sends the weight's path a second time through ``K`` with the dropped input; here only the
    LoRA's path drops.

    Args:
      rank: r, or one for each element of a stacked weight (layers of a scan, flattened); the stack is padded to the largest.
      alpha: ``s = alpha / r``; None takes alpha = rank. dropout: on the input of the LoRA, during training.
      init: ``kaiming``: ``a`` uniform in +-1/sqrt(n_in); ``gaussian``: normal with standard deviation 1/r.
      rank_stabilised: ``s = alpha / sqrt(r)``.
      norm: ``constant``: the backward pass takes ``||W||`` for a constant, as section 4.3 proposes; ``differentiated``: the exact gradient.

    Raises:
      ValueError: an unknown choice, or (at a site) a rank above its smaller dimension or a tuple of ranks of the wrong length.

    Example:
      >>> dora(rank=4).exact_init
      False
    """
    check_choice("dora", "init", init, ("kaiming", "gaussian"))
    check_choice("dora", "norm", norm, ("constant", "differentiated"))
    check_dropout("dora", dropout)
    scale = scaling(largest(rank), alpha, rank_stabilised)

    def leaves(site: Site) -> dict[str, Leaf]:
        # Float32 whatever the adapter is stored in: rounded, a length would no longer start at the weight's.
        return {**pair_leaves("dora", rank, site), "magnitude": Leaf((site.n_out,), ("out",), dtype=jnp.float32)}

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        norms = jnp.linalg.norm(given.need("kernel"), axis=-2)
        return {**zero_b(key, site, rank, init), "magnitude": norms}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Magnitude:
        return Magnitude(
            LowRank(leaves["a"], leaves["b"], scale=scale, dropout=dropout), leaves["magnitude"], norm=norm
        )

    return Method(Magnitude, leaves, init_leaves, expand, exact_init=False, needs=frozenset({"kernel"}))
