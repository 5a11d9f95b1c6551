"""ViDA: a narrow and a wide LoRA on one weight, weighed against each other by how unsure the model is of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, method
from lowrank_jax.methods.lora_pair import pair_leaves, zero_b
from lowrank_jax.sites import Site

SCALES = "vida_scales"


@method
def vida(
    rank: int = 1, high_rank: int = 128, dropout: float = 0.0, init: Literal["official", "kaiming"] = "official"
) -> Method:
    """ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation (ICLR 2024, arXiv 2306.04344).

    ``y = x K + l_low x A_l B_l + l_high x A_h B_h`` with ``A_l [n_in, r_l]`` and ``A_h [n_in, r_h]``, both ``B`` zero at first. The wide
    branch follows the domain at hand, the narrow one keeps what domains share. Their scales (``vida_scales [2]``, ones at first) are
    frozen leaves: `lowrank_jax.vida_scales` finds them for a batch and `lowrank_jax.with_vida_scales` sets them, in the student and in
    its teacher, before the batch is learned from. For a model that adapts while it is in use. Merges at the scales it has.
    Count: ``(r_l + r_h) * (n_in + n_out)``.

    Args:
      rank: r_l. high_rank: r_h; 128 in the release, at a width of 768.
      dropout: on the input of both branches, during training.
      init: of both ``A``: ``official``: normal with standard deviation 1/r^2 as in the release, which for a wide branch is nearly zero;
        ``kaiming``: uniform in +-1/sqrt(n_in).

    Raises:
      ValueError: an unknown init, or (at a site) a rank above its smaller dimension.

    Example:
      >>> vida(rank=1, high_rank=16).name
      'vida'
    """
    check_choice("vida", "init", init, ("official", "kaiming"))
    check_dropout("vida", dropout)
    branches = {"low_": rank, "high_": high_rank}
    of_branch = np.repeat([0, 1], [rank, high_rank])

    def leaves(site: Site) -> dict[str, Leaf]:
        kept = {SCALES: Leaf((2,), ("branch",), trains=None, dtype=jnp.float32)}
        for prefix, r in branches.items():
            kept |= pair_leaves("vida", r, site, prefix)
        return kept

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        made = {SCALES: jnp.ones((*site.batch_shape, 2))}
        for n, (prefix, r) in enumerate(branches.items()):
            own = jax.random.fold_in(key, n)
            pair = zero_b(own, site, r, "kaiming", prefix)
            if init == "official":
                pair[f"{prefix}a"] = jax.random.normal(own, pair[f"{prefix}a"].shape) / r**2
            made |= pair
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        # Side by side the branches cost two products as one LoRA does; the scales are a diagonal between them.
        a, b = (jnp.concatenate([leaves[f"{p}{n}"] for p in branches], axis) for n, axis in (("a", -1), ("b", -2)))
        return LowRank(a, b, leaves[SCALES][..., of_branch], dropout=dropout)

    return Method(LowRank, leaves, init_leaves, expand)
