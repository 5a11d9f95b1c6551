"""LoRA: a trainable low-rank update beside a frozen weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Leaves, Method, check_choice, check_dropout, check_rank, method, random_a, scaling
from lowrank_jax.sites import Site


@method
def lora(
    rank: int = 8,
    alpha: float | None = None,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    rank_stabilised: bool = False,
    dropout: float = 0.0,
) -> Method:
    """LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

    ``y = x K + s * (x a) b`` with ``a [n_in, r]`` and ``b [r, n_out]`` both trained, ``b`` zero at first.
    Count: ``r * (n_in + n_out)``.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank.
      init: ``kaiming``: ``a`` uniform in +-1/sqrt(n_in), as in PEFT; ``gaussian``: normal with standard deviation 1/r.
      rank_stabilised: ``s = alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732).
      dropout: on the input of this path, during training.

    Raises:
      ValueError: an unknown init, or (at a site) a rank above its smaller dimension.

    Example:
      >>> lora(rank=4, alpha=8).name
      'lora'
    """
    check_choice("lora", "init", init, ("kaiming", "gaussian"))
    check_dropout("lora", dropout)
    scale = scaling(rank, alpha, rank_stabilised)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("lora", rank, site)
        return {"a": a_leaf(site, rank), "b": b_leaf(site, rank)}

    def init_leaves(key: jax.Array, site: Site, kernel: jax.Array | None) -> Leaves:
        a = random_a(key, (*site.batch_shape, site.n_in, rank), init)
        return {"a": a, "b": jnp.zeros((*site.batch_shape, rank, site.n_out))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], shared: Mapping[str, jax.Array]) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], scale=scale, dropout=dropout)

    return Method(LowRank, leaves, init_leaves, expand)
