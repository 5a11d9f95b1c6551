"""LoLDU: the leading pivots of an LDU decomposition of the weight are trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import linalg
from lowrank_jax.methods.base import Given, Method, method, scaling
from lowrank_jax.methods.diagonal import trained_diagonal
from lowrank_jax.sites import Site

_LONGEST = 1e3


@method
def loldu(rank: int = 256, alpha: float | None = None) -> Method:
    """LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning (arXiv 2410.13618).

    The transposed weight is factored, ``K^T = P L diag(d) U`` with a permutation ``P``, ``L`` unit lower and ``U`` unit upper triangular;
    the first ``r`` pivots become the trained ``e [r]``, which starts at ``d_r``: ``y = x (K - s a diag(d_r) b) + s * x a diag(e) b`` with
    ``a = U[:r]^T`` ``[n_in, r]`` and ``b = (P L[:, :r])^T`` ``[r, n_out]`` frozen. Cheaper to start than methods with a singular value
    decomposition: one LU. For adapters of a few hundred numbers a weight.
    Count: ``r``.

    ``P`` is multiplied into ``b``, so no permutation is kept. A weight that ignores an input has a pivot of zero before a row of ``U``
    that is not: where a pivot is below a thousandth of its row, ``e`` starts at the row's largest entry instead and ``a`` is the row over
    that, so that the product is the same and no direction is longer than a thousand; a row of zeros stands for its unit vector, with
    ``e = 0``. The release's other starts of ``e``, which do not preserve the output, and its trained scale, which its optimizer never
    sees, are left out.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank.

    Raises:
      ValueError: (at a site) a rank above its smaller dimension.

    Example:
      >>> loldu(rank=4).exact_init
      True
    """

    def decompose(key: jax.Array, site: Site, given: Given) -> tuple[jax.Array, jax.Array, jax.Array]:
        weight = jnp.swapaxes(given.need("kernel"), -1, -2)
        packed, permutation = linalg.each(lambda m: lax.linalg.lu(m)[::2], weight)
        k = site.max_rank
        lower = jnp.tril(packed[..., :k], -1) + jnp.eye(site.n_out, k)
        # Row i of L belongs to row permutation[i] of the weight.
        lower = jnp.take_along_axis(lower, jnp.argsort(permutation, -1)[..., None], -2)
        rows = jnp.triu(packed[..., :k, :])
        pivots, longest = jnp.diagonal(rows, axis1=-2, axis2=-1), jnp.abs(rows).max(-1)
        divisor = jnp.where(jnp.abs(pivots) > longest / _LONGEST, pivots, jnp.where(longest > 0, longest, 1))
        upper = rows / divisor[..., None] + jnp.where(longest > 0, 0, 1)[..., None] * jnp.eye(k, site.n_in)
        e = jnp.where(longest > 0, divisor, 0)
        return jnp.swapaxes(upper[..., :rank, :], -1, -2), e[..., :rank], jnp.swapaxes(lower[..., :rank], -1, -2)

    return trained_diagonal("loldu", rank, scaling(rank, alpha), decompose)
