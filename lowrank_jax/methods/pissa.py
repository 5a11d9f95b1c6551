"""PiSSA: LoRA started from the principal singular directions of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_choice, check_rank, method, scaling
from lowrank_jax.sites import Site


@method
def pissa(rank: int = 16, alpha: float | None = None, svd: Literal["randomized", "exact"] = "randomized") -> Method:
    """PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models (arXiv 2404.02948).

    With ``K = U diag(sig) V^T``: ``a = U_r sqrt(sig_r / s)`` and ``b = sqrt(sig_r / s) V_r^T`` are trained, and the base acts
    as ``K - s a0 b0`` with the initial factors ``a0, b0`` as a frozen anchor, so the output starts at the base's.
    Count: ``r * (n_in + n_out)``. No dropout: dropping principal directions harms.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank.
      svd: ``randomized`` (range finder) or ``exact``; either way the anchor is made of the factors actually found.

    Raises:
      ValueError: an unknown svd, or (at a site) a rank above its smaller dimension.

    Example:
      >>> pissa(rank=4).exact_init
      False
    """
    check_choice("pissa", "svd", svd, ("randomized", "exact"))
    scale = scaling(rank, alpha)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("pissa", rank, site)
        frozen = {"trains": None, "anchor": True}
        return {
            "a": a_leaf(site, rank),
            "b": b_leaf(site, rank),
            "a0": a_leaf(site, rank, **frozen),
            "b0": b_leaf(site, rank, **frozen),
        }

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        kernel = given.need("kernel")
        u, sigma, vt = linalg.svd(kernel, rank, key=key, method=svd)
        root = jnp.sqrt(sigma / scale)
        a, b = u * root[..., None, :], root[..., None] * vt
        return {"a": a, "b": b, "a0": a, "b0": b}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        a, b = leaves["a"], leaves["b"]
        if "a0" in leaves:
            a = jnp.concatenate([a, leaves["a0"]], axis=-1)
            b = jnp.concatenate([b, -leaves["b0"]], axis=-2)
        return LowRank(a, b, scale=scale)

    def anchor(site: Site, leaves: Mapping[str, jax.Array]) -> LowRank:
        return LowRank(leaves["a0"], leaves["b0"], scale=scale)

    return Method(LowRank, leaves, init, expand, anchor=anchor, exact_init=False, needs=frozenset({"kernel"}))
