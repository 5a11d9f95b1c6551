"""PETALface: one LoRA for poor images and one for good ones, mixed by how good each image is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank, QualityPair
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.forms.quality_pair import weight_of
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
def petalface(
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    threshold: float = 0.5,
    quality: float | None = None,
    compat: Literal["paper", "official"] = "paper",
) -> Method:
    """PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition (arXiv 2412.07771).

    ``y = x K + bias + s drop((1 - w) x A_1 B_1) + s drop(w x A_2 B_2)`` with a weight of each image by its quality ``q``,
    ``w = clip(0.5 + (q - threshold), 0, 1)``; ``A_i [n_in, r]`` normal with standard deviation 1/r, ``B_i [r, n_out]`` zero at first. For
    a model whose inputs are of two kinds, sharp gallery images and blurred probes in the paper. The caller gives the qualities,
    ``signals={"quality": [batch]}``: of a measure that grows with quality, scaled so that most are within 0.5 of the threshold. Where a
    layer sees several rows for each image (windows of a Swin transformer, image by image), they share its weight.
    Count: ``2 * r * (n_in + n_out)``. The LoRAs lie side by side in ``a [n_in, 2 r]`` and ``b [2 r, n_out]``, the first in front.

    It merges only for a fixed quality: see `lowrank_jax.at_quality`.

    Args:
      rank: r of each LoRA. alpha: ``s = alpha / r``; None takes alpha = rank, the release's ``s = 1``.
      dropout: on the output of each LoRA, during training; 0.1 in the release.
      threshold: the quality at which both LoRAs have the same weight.
      quality: the quality of every image; None: each image's own. With it there is no dropout.
      compat: ``official``: ``w`` is not kept in [0, 1], so a very good image subtracts the first LoRA.

    Raises:
      ValueError: an unknown choice, dropout with a fixed quality, or (at a site) a rank above its smaller dimension. When called: no
        ``quality`` signal, or a number of rows that is no multiple of the images.

    Example:
      >>> petalface(rank=4).form.record.delta, petalface(rank=4, quality=0.7).form.record.delta
      (False, True)
    """
    check_choice("petalface", "compat", compat, ("paper", "official"))
    check_dropout("petalface", dropout)
    if quality is not None and dropout:
        raise ValueError(
            f"petalface(dropout={dropout}): expected 0 with a fixed quality, which is for merging and serving."
        )
    scale, clip = scaling(rank, alpha), compat == "paper"

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("petalface", rank, site)
        return {"a": a_leaf(site, 2 * rank), "b": b_leaf(site, 2 * rank)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a = jax.random.normal(key, (*site.batch_shape, site.n_in, 2 * rank)) / rank
        return {"a": a, "b": jnp.zeros((*site.batch_shape, 2 * rank, site.n_out))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> QualityPair | LowRank:
        a, b = leaves["a"], leaves["b"]
        if quality is None:
            return QualityPair(a, b, scale=scale, threshold=threshold, dropout=dropout, clip=clip)
        second = weight_of(quality, threshold, clip)
        weights = jnp.repeat(jnp.stack([1 - second, second]), rank)
        return LowRank(a, b, jnp.broadcast_to(weights, (*site.batch_shape, 2 * rank)), scale=scale)

    return Method(QualityPair if quality is None else LowRank, leaves, init, expand)
