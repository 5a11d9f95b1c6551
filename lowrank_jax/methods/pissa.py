"""PiSSA: LoRA started from the principal singular directions of the weight."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.methods.base import Given, Method, method, scaling
from lowrank_jax.methods.lora_pair import anchored_pair
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

    def start(key: jax.Array, site: Site, given: Given) -> tuple[jax.Array, jax.Array]:
        u, sigma, vt = linalg.svd(given.need("kernel"), rank, key=key, method=svd)
        root = jnp.sqrt(sigma / scale)
        return u * root[..., None, :], root[..., None] * vt

    return anchored_pair("pissa", rank, scale, start, frozenset({"kernel"}))
