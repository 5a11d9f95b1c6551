"""Subspace update: a weight trained in a subspace that stays as it is until somebody changes it. What GaLore is between refreshes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf, mid_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_rank, method, scaling
from lowrank_jax.optim.subspace import Side, sides
from lowrank_jax.sites import Site


@method
def subspace_update(rank: int = 128, side: Side = "smaller") -> Method:
    """Training in a fixed subspace: ``y = x K + x P r``, ``P [n_in, rank]`` orthonormal and frozen, ``r [rank, n_out]`` trained from zero.

    What GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (arXiv 2403.03507) is between two refreshes: the gradient of
    ``r`` is ``P^T G``. `lowrank_jax.dual_galore` refreshes ``P``, which starts random. Where the output side is projected it is
    ``x r Q^T``, with ``r [n_in, rank]``; with ``side="both"``, ``x P r Q^T`` with ``r [rank, rank]``.
    Count: ``rank * n_out``, ``n_in * rank`` or ``rank * rank``.

    Args:
      rank: at most the weight's smaller dimension. side: see `lowrank_jax.optim.subspace.sides`.

    Raises:
      ValueError: an unknown side, or (at a site) a rank above its smaller dimension.

    Example:
      >>> import lowrank_jax as lr
      >>> lr.plan({"x": {"kernel": jnp.ones((4, 6))}}, {"x": subspace_update(rank=2)}).trainable
      12
    """
    check_choice("subspace_update", "side", side, get_args(Side))
    scaling(rank, None)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("subspace_update", rank, site)
        inputs, outputs = sides(side, site.n_in, site.n_out)
        out = {"p": a_leaf(site, rank, trains=None)} if inputs else {}
        out |= {"q": b_leaf(site, rank, trains=None)} if outputs else {}
        return out | {
            "r": mid_leaf(site, rank) if len(out) == 2 else b_leaf(site, rank) if inputs else a_leaf(site, rank)
        }

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        inputs, outputs = sides(side, site.n_in, site.n_out)
        first, second = jax.random.split(key)
        basis = lambda key, n: linalg.qr(jax.random.normal(key, (*site.batch_shape, n, rank)))[0]  # noqa: E731
        out = {"p": basis(first, site.n_in)} if inputs else {}
        out |= {"q": jnp.swapaxes(basis(second, site.n_out), -1, -2)} if outputs else {}
        shape = (rank if inputs else site.n_in, rank if outputs else site.n_out)
        return out | {"r": jnp.zeros((*site.batch_shape, *shape))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        r = leaves["r"]
        if "p" not in leaves:
            return LowRank(r, leaves["q"])
        return LowRank(leaves["p"], leaves["q"], r) if "q" in leaves else LowRank(leaves["p"], r)

    return Method(LowRank, leaves, init, expand)
