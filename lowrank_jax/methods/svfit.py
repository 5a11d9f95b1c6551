"""SVFit: the largest singular values of the weight are trained, its singular vectors stay."""

from __future__ import annotations

from typing import Literal

import jax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.methods.base import Given, Method, method, scaling
from lowrank_jax.methods.diagonal import trained_diagonal
from lowrank_jax.sites import Site


@method
def svfit(rank: int = 256, svd: Literal["randomized", "exact"] = "randomized") -> Method:
    """SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values (arXiv 2409.05926).

    With ``K = U diag(sig) V^T``, ``y = x (K - U_r diag(sig_r) V_r^T) + x U_r diag(e) V_r^T``: ``e [r]`` starts at ``sig_r`` and is
    trained, the
    singular vectors are frozen. For the smallest adapters that still turn every leading direction up or down; takes a large rank
    and a learning rate well above LoRA's.
    Count: ``r``.

    Only the abstract and a summary of the paper were at hand: that there is no ``alpha / r`` and that the rank is in the hundreds
    are reconstructions.

    Args:
      rank: r. svd: ``randomized`` (range finder) or ``exact``.

    Raises:
      ValueError: an unknown svd, or (at a site) a rank above its smaller dimension.

    Example:
      >>> svfit(rank=4).exact_init
      True
    """
    check_choice("svfit", "svd", svd, ("randomized", "exact"))

    def decompose(key: jax.Array, site: Site, given: Given) -> tuple[jax.Array, jax.Array, jax.Array]:
        return linalg.svd(given.need("kernel"), rank, key=key, method=svd)

    return trained_diagonal("svfit", rank, scaling(rank, None), decompose)
