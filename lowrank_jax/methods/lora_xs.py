"""LoRA-XS: a trainable r x r matrix between the frozen singular vectors of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf, mid_leaf
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    check_rank,
    method,
    scaling,
)
from lowrank_jax.sites import Site


@method
def lora_xs(
    rank: int = 16,
    alpha: float | None = 16.0,
    dropout: float = 0.0,
    init_std: float = 1e-5,
    svd: Literal["randomized", "exact"] = "randomized",
) -> Method:
    """LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (arXiv 2405.17604).

    ``y = x K + s * x a m b`` with ``K = U diag(sig) V^T``, ``a = U_r diag(sig_r)`` and ``b = V_r^T`` frozen and ``m [r, r]`` trained from
    ``N(0, init_std^2)``. The singular values sit on the input side. The output starts at the base's up to ``init_std``.
    Count: ``r * r``.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank. dropout: on the input of this path, during training.
      init_std: standard deviation of the core at init. svd: ``randomized`` (range finder) or ``exact``.

    Raises:
      ValueError: an unknown svd, or (at a site) a rank above its smaller dimension.

    Example:
      >>> dict(lora_xs(rank=4).config)["alpha"]
      16.0
    """
    check_choice("lora_xs", "svd", svd, ("randomized", "exact"))
    check_dropout("lora_xs", dropout)
    scale = scaling(rank, alpha)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("lora_xs", rank, site)
        return {
            "a": a_leaf(site, rank, trains=None),
            "m": mid_leaf(site, rank),
            "b": b_leaf(site, rank, trains=None),
        }

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        kernel = given.need("kernel")
        svd_key, core_key = jax.random.split(key)
        u, sigma, vt = linalg.svd(kernel, rank, key=svd_key, method=svd)
        m = init_std * jax.random.normal(core_key, (*site.batch_shape, rank, rank))
        return {"a": u * sigma[..., None, :], "m": m, "b": vt}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], leaves["m"], scale=scale, dropout=dropout)

    return Method(LowRank, leaves, init, expand, exact_init=False, needs=frozenset({"kernel"}))
