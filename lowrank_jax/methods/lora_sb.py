"""LoRA-SB: a small trained core between frozen factors that approximate the first step of full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf, mid_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, check_rank, method
from lowrank_jax.sites import Site


@method
def lora_sb(
    rank: int = 32, rate: float = 1e-5, dropout: float = 0.0, svd: Literal["randomized", "exact"] = "randomized"
) -> Method:
    """LoRA-SB: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning (arXiv
    2411.19557).

    ``y = x K + x a m b`` with ``a [n_in, r]`` and ``b [r, n_out]`` frozen and only ``m [r, r]`` trained. The first step of Adam at full
    rank would be ``-rate * sign(G)`` for the gradient ``G`` of the loss; with its singular value decomposition ``U diag(S) V^T``,
    ``a = U_r``,
    ``m = diag(S_r)`` and ``b = V_r^T``. So training starts from the best rank-r part of that step, not from the base, and with orthonormal
    factors the gradient of ``m`` needs no scaling. Needs the statistic ``gradient`` (`lowrank_jax.collect`) of some dozens of examples.
    Count: ``r * r``, where LoRA has ``r * (n_in + n_out)``.

    Args:
      rank: r. rate: of the first step, the learning rate at the start of the warmup (``learning_rate / warmup_steps``).
      dropout: on the input of this path, during training. svd: ``randomized`` (range finder) or ``exact``.

    Raises:
      ValueError: an unknown svd, ``rate`` not above 0, or (at a site) a rank above its smaller dimension.

    Example:
      >>> lora_sb(rank=4).exact_init
      False
    """
    check_choice("lora_sb", "svd", svd, ("randomized", "exact"))
    check_dropout("lora_sb", dropout)
    if rank < 1 or not rate > 0:
        raise ValueError(f"lora_sb(rank={rank}, rate={rate}): expected a rank of at least 1 and a rate above 0.")

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("lora_sb", rank, site)
        return {"a": a_leaf(site, rank, trains=None), "m": mid_leaf(site, rank), "b": b_leaf(site, rank, trains=None)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        step = -rate * jnp.sign(given.need("gradient"))
        u, s, vt = linalg.svd(step, rank, key=key, method=svd)
        return {"a": u, "m": s[..., None] * jnp.eye(rank), "b": vt}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], leaves["m"], dropout=dropout)

    return Method(LowRank, leaves, init, expand, exact_init=False, needs=frozenset({"gradient"}))
