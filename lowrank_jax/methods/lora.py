"""LoRA: a trainable low-rank update beside a frozen weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
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
from lowrank_jax.optim.scale_leaf import scale_leaf
from lowrank_jax.sites import Site


@method
def lora(
    rank: Rank = 8,
    alpha: float | None = None,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    rank_stabilised: bool = False,
    dropout: float = 0.0,
    plus: float = 1.0,
) -> Method:
    """LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

    ``y = x K + s * (x a) b`` with ``a [n_in, r]`` and ``b [r, n_out]`` both trained, ``b`` zero at first.
    Count: ``r * (n_in + n_out)``.

    Args:
      rank: r, or one for each element of a stacked weight (layers of a scan, flattened); the stack is padded to the largest.
      alpha: ``s = alpha / r``; None takes alpha = rank.
      init: ``kaiming``: ``a`` uniform in +-1/sqrt(n_in), as in PEFT; ``gaussian``: normal with standard deviation 1/r.
      rank_stabilised: ``s = alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732).
      dropout: on the input of this path, during training.
      plus: learning rate of ``b`` over that of ``a`` (LoRA+, arXiv 2402.12354, which recommends 16).

    Raises:
      ValueError: an unknown init, or (at a site) a rank above its smaller dimension.

    Example:
      >>> lora(rank=4, alpha=8).name
      'lora'
    """
    check_choice("lora", "init", init, ("kaiming", "gaussian"))
    check_dropout("lora", dropout)
    if not plus > 0:
        raise ValueError(f"lora(plus={plus}): expected a positive ratio of learning rates.")
    scale = scaling(largest(rank), alpha, rank_stabilised)

    def leaves(site: Site) -> dict[str, Leaf]:
        return pair_leaves("lora", rank, site)

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        return zero_b(key, site, rank, init)

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], scale=scale, dropout=dropout)

    transform = None if plus == 1 else lambda total_steps: scale_leaf("b", plus)
    return Method(LowRank, leaves, init_leaves, expand, transform=transform)
