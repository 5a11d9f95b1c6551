"""LoRA-GA: LoRA started so that its first step goes where full fine-tuning's would."""

from __future__ import annotations

import math
from typing import Literal

import jax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.methods.base import Given, Method, check_dropout, check_rank, method, scaling
from lowrank_jax.methods.lora_pair import anchored_pair
from lowrank_jax.sites import Site


@method
def lora_ga(
    rank: int = 8,
    alpha: float | None = 16.0,
    rank_stabilised: bool = True,
    dropout: float = 0.0,
    gamma: float = 16.0,
    size: Literal["stable", "gd", "unit"] = "stable",
    svd: Literal["randomized", "exact"] = "randomized",
) -> Method:
    """LoRA-GA: Low-Rank Adaptation with Gradient Approximation (arXiv 2407.05000).

    With the mean gradient of the loss at the weight, ``G = V S U^T`` ``[n_in, n_out]``, LoRA starts at ``a = c V[:, :r]`` and
    ``b = c U[:, r:2r]^T``, whose singular directions are disjoint, and the base acts as ``K - s a0 b0`` with the initial factors as
    a frozen anchor. One step of gradient descent then moves the weight along the best rank-2r approximation of ``G``. Use it where LoRA
    converges too slowly. Needs the statistic ``gradient`` (`lowrank_jax.collect`), a few batches of it.
    Count: ``r * (n_in + n_out)``.

    This is the algorithm of the paper and its first release; the port in PEFT scales one factor by the singular values, which moves
    elsewhere.

    Args:
      rank: r, at most half of the weight's smaller dimension. alpha: ``s = alpha / sqrt(r)``; None takes alpha = rank.
      rank_stabilised: False takes ``s = alpha / r``. dropout: on the input of this path, during training.
      gamma: for ``stable``, the paper's scale of the start; larger starts smaller.
      size: ``stable``: ``c = n_out^(1/4) / sqrt(gamma)``, which keeps the output's variance; ``gd``: ``c = 1 / s``; ``unit``: 1.
      svd: ``randomized`` (range finder) or ``exact``.

    Raises:
      ValueError: an unknown choice, ``gamma`` not above 0, or (at a site) a rank above half of its smaller dimension.

    Example:
      >>> sorted(lora_ga(rank=4).needs)
      ['gradient']
    """
    check_choice("lora_ga", "size", size, ("stable", "gd", "unit"))
    check_choice("lora_ga", "svd", svd, ("randomized", "exact"))
    check_dropout("lora_ga", dropout)
    if not gamma > 0:
        raise ValueError(f"lora_ga(gamma={gamma}): expected a number above 0.")
    scale = scaling(rank, alpha, rank_stabilised)

    def start(key: jax.Array, site: Site, given: Given) -> tuple[jax.Array, jax.Array]:
        v, _, ut = linalg.svd(given.need("gradient"), 2 * rank, key=key, method=svd)
        c = {"stable": site.n_out**0.25 / math.sqrt(gamma), "gd": 1 / scale, "unit": 1.0}[size]
        return c * v[..., :rank], c * ut[..., rank:, :]

    def check(site: Site) -> None:
        check_rank("lora_ga", rank, site, site.max_rank // 2)

    return anchored_pair("lora_ga", rank, scale, start, frozenset({"gradient"}), dropout=dropout, check=check)
