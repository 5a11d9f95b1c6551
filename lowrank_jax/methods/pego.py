"""PEGO: a group of LoRAs kept apart from the weight and from each other by a penalty."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    Seen,
    check_dropout,
    check_rank,
    method,
    scaling,
)
from lowrank_jax.methods.lora_pair import zero_b
from lowrank_jax.sites import Site


@method
def pego(
    rank: int = 4,
    group: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    preserve: float = 1e-3,
    diversify: float = 1e-3,
    norm: Literal["l1", "frobenius"] = "l1",
    operand: Literal["product", "a"] = "product",
    average: bool = False,
) -> Method:
    """PEGO (arXiv 2407.15085).

    Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization.

    ``y = x K + s sum_i x A_i B_i`` over a group of N LoRAs, ``A_i [n_in, r]``, ``B_i [r, n_out]``, ``B_i`` zero at first, and a penalty
    ``preserve * sum_i |K^T A_i B_i| + diversify * sum_{i<j} |(A_i B_i)^T A_j B_j|``: what the group does to an input is kept orthogonal to
    what the weight does, and each to the others. For training on some domains and use on another. Merges to a plain weight.
    Count: ``N * r * (n_in + n_out)``. The factors of the group lie side by side in ``a [n_in, N r]`` and ``b [N r, n_out]``, so that the
    group costs two products as one LoRA does.

    The penalty is read from the release, as the pages at hand do not give the paper's equations: entries' absolute values, summed, of
    products that reach over the inputs, with one coefficient for both parts. It makes ``N (N + 1) / 2`` matrices ``n_out x n_out`` for each
    weight, one after another; with ``norm="frobenius"`` or ``operand="a"`` nothing is larger than ``n_out x r``.

    Args:
      rank: r of each LoRA. group: N; the release takes 2 or 4.
      alpha: ``s = alpha / r``; None takes alpha = rank, the release's ``s = 1``; the penalty sees the factors without ``s``.
      dropout: on the input of the group, during training.
      preserve, diversify: coefficients of the two parts; 1e-3 each in the release, which sums over all entries.
      norm: ``l1``: sum of absolute values; ``frobenius``: sum of squares.
      operand: ``product``: ``A_i B_i``, zero at first; ``a``: ``A_i`` in its place, a penalty from the first step on.
      average: mean over the entries of each matrix instead of the sum, so that a coefficient serves weights of any size.

    Raises:
      ValueError: an unknown choice, a group below 1, a negative coefficient, or (at a site) a rank above its smaller dimension.

    Example:
      >>> pego(rank=2, group=3).name
      'pego'
    """
    check_choice("pego", "norm", norm, ("l1", "frobenius"))
    check_choice("pego", "operand", operand, ("product", "a"))
    check_dropout("pego", dropout)
    if group < 1:
        raise ValueError(f"pego(group={group}): expected at least 1 LoRA.")
    for field, value in (("preserve", preserve), ("diversify", diversify)):
        if value < 0:
            raise ValueError(f"pego({field}={value}): expected a coefficient of at least 0.")
    scale = scaling(rank, alpha)
    flip = lambda m: jnp.swapaxes(m, -1, -2)  # noqa: E731
    ones = np.tile(np.eye(rank, dtype=np.float32), (group, 1))

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("pego", rank, site)
        return {"a": a_leaf(site, group * rank), "b": b_leaf(site, group * rank)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        return zero_b(key, site, group * rank, "kaiming")

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], scale=scale, dropout=dropout)

    def size(u: jax.Array, v: jax.Array) -> jax.Array:
        """Of the entries of ``u @ v``, two matrices."""
        total = jnp.abs(u @ v).sum() if norm == "l1" else ((u.T @ u) * (v @ v.T)).sum()
        return total / (u.shape[0] * v.shape[1]) if average else total

    def sizes(products: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        """Summed over products and layers."""
        u, v = (jnp.stack(side).reshape(-1, *side[0].shape[-2:]) for side in zip(*products, strict=True))
        # A product is n_out x n_out: one at a time, and made again on the way back instead of kept.
        return jax.lax.map(lambda pair: jax.checkpoint(size)(*pair), (u, v)).sum()

    def of_site(site: Seen) -> jax.Array:
        a, b = (site.leaves[name].astype(jnp.float32) for name in ("a", "b"))
        if operand == "a":
            b = jnp.broadcast_to(ones, (*b.shape[:-2], group * rank, rank))
        members = list(zip(jnp.split(a, group, -1), jnp.split(b, group, -2), strict=True))
        kernel = flip(site.kernel.astype(jnp.float32))
        total = preserve * sizes([(kernel @ a, b) for a, b in members])
        pairs = itertools.combinations(members, 2)
        if group > 1:
            total += diversify * sizes([(flip(b1) @ (flip(a1) @ a2), b2) for (a1, b1), (a2, b2) in pairs])
        return total

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        return jnp.stack([of_site(site) for site in seen.values()]).sum()

    return Method(LowRank, leaves, init, expand, penalty=penalty if preserve or diversify else None)
