"""CorDA: LoRA started from a decomposition of the weight that the covariance of its inputs orients."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.methods.base import Given, Method, check_dropout, method, scaling
from lowrank_jax.methods.lora_pair import anchored_pair
from lowrank_jax.sites import Site

Mode = Literal["instruction_previewed", "knowledge_preserved"]
_ERROR = 0.05  # how far C C^-1 may be from the identity, as in the release


@method
def corda(
    rank: int = 16,
    alpha: float | None = None,
    mode: Mode = "instruction_previewed",
    dropout: float = 0.0,
    damping: float = 0.01,
    svd: Literal["randomized", "exact"] = "randomized",
) -> Method:
    """CorDA: Context-Oriented Decomposition Adaptation of Large Language Models (arXiv 2406.05223).

    With the covariance ``C = mean x x^T`` ``[n_in, n_in]`` of the weight's inputs and ``C K = P S Q^T``, LoRA starts at
    ``a = C^-1 P_r sqrt(S_r / s)``, ``b = sqrt(S_r / s) Q_r^T``, and the base acts as ``K - s a0 b0`` with these as a frozen anchor. Needs
    the statistic ``covariance`` (`lowrank_jax.collect`): of the task's own inputs for ``instruction_previewed``, which trains the ``r``
    largest components; of texts whose knowledge is to be kept for ``knowledge_preserved``, which trains the smallest. With ``C = I`` the
    first is PiSSA. Dense weights only.
    ``C`` is divided by its mean diagonal first, so that how ``a`` and ``b`` share the start does not depend on the unit of the inputs; the
    release divides each example's inputs by their largest entry instead. The product ``a b`` is the same either way.
    Count: ``r * (n_in + n_out)``.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank. mode: see above. dropout: on the input of this path.
      damping: ``C`` gets this share of its mean diagonal added, doubled until its inverse is good to 5%.
      svd: for ``instruction_previewed``: ``randomized`` (range finder) or ``exact``; the smallest components need the exact one.

    Raises:
      ValueError: an unknown choice, ``damping`` not above 0, or (at a site) a rank above its smaller dimension.

    Example:
      >>> sorted(corda(rank=4).needs)
      ['covariance', 'kernel']
    """
    check_choice("corda", "mode", mode, ("instruction_previewed", "knowledge_preserved"))
    check_choice("corda", "svd", svd, ("randomized", "exact"))
    check_dropout("corda", dropout)
    if not damping > 0:
        raise ValueError(f"corda(damping={damping}): expected a number above 0.")
    scale = scaling(rank, alpha)

    def start(key: jax.Array, site: Site, given: Given) -> tuple[jax.Array, jax.Array]:
        covariance, inverse = linalg.each(lambda c: _damped(c, damping), given.need("covariance"))
        oriented = jnp.matmul(covariance, given.need("kernel"), precision="highest")
        if mode == "instruction_previewed":
            p, s, qt = linalg.svd(oriented, rank, key=key, method=svd)
        else:
            p, s, qt = linalg.svd(oriented, site.max_rank, method="exact")
            p, s, qt = p[..., -rank:], s[..., -rank:], qt[..., -rank:, :]
        root = jnp.sqrt(s / scale)
        return jnp.matmul(inverse, p, precision="highest") * root[..., None, :], root[..., None] * qt

    needs = frozenset({"kernel", "covariance"})
    return anchored_pair("corda", rank, scale, start, needs, dropout=dropout, kinds=frozenset({"dense"}))


def _damped(c: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """``C`` over its mean diagonal, with as much added to its diagonal as its inverse needs, and that inverse."""
    one, size = jnp.eye(c.shape[-1]), jnp.diagonal(c).mean()
    c = jnp.where(size > 0, c / jnp.where(size > 0, size, 1), one)  # inputs that were always zero have no directions

    def inverse(share: jax.Array) -> jax.Array:
        return jnp.linalg.inv(c + share * one)

    def worse(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        share, inverse = state
        error = jnp.linalg.norm(jnp.matmul(c + share * one, inverse, precision="highest") - one)
        # 2^20 times the first damping leaves a multiple of the identity: the search ends there whatever the matrix.
        return ~(error < _ERROR) & (share < damping * 2**20)

    first = jnp.float32(damping)
    share, inverted = jax.lax.while_loop(worse, lambda s: (2 * s[0], inverse(2 * s[0])), (first, inverse(first)))
    return c + share * one, inverted
