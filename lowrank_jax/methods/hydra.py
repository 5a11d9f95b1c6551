"""Hydra: a low-rank branch beside the weight and another behind it, both linear."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Bottleneck, Branches, Leaf
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
from lowrank_jax.methods.bottleneck_leaves import INITS, Init, bottleneck_leaves, factors, zero_up
from lowrank_jax.sites import Site


@method
def hydra(
    rank: int = 2,
    sequential_rank: int | None = None,
    scale: float = 1.0,
    bias: bool = False,
    dropout: float = 0.0,
    init: Init = "xavier",
) -> Method:
    """Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning (arXiv 2309.06922).

    ``y = z + s P(x) + s Q(z)`` with ``z = x K + b``, ``P(x) = (x A_p + a_p) B_p + c_p`` and ``Q(z) = (z A_s + a_s) B_s + c_s``. The
    parallel branch (``A_p [n_in, r_p]``, ``B_p [r_p, n_out]``) learns new features, the sequential one (``A_s [n_out, r_s]``,
    ``B_s [r_s, n_out]``) combines those the weight has. Both ``B`` start at zero. For tasks close to what the base knows: part of the
    update stays among the weight's own outputs. It merges into ``K + s (A_p B_p + K A_s B_s)`` and
    ``b + s (a_p B_p + c_p + b A_s B_s + a_s B_s + c_s)``.
    Count: ``r_p (n_in + n_out) + 2 r_s n_out``, with biases ``r_p + r_s + 2 n_out`` more.

    The paper attaches it to the output projections of attention and of the MLP.

    Args:
      rank: r_p. sequential_rank: r_s; None: the same.
      scale: s, a plain factor that is not divided by the rank; tuned by dataset in the paper.
      bias: whether the branches have biases ``a`` and ``c``, as in the release for images; a weight without a bias of its own cannot be
        merged then.
      dropout: between the two products of each branch, during training.
      init: of ``A``, by benchmark of the release: ``xavier``: uniform in +-sqrt(6 / (n + r)); ``normal``: deviation 0.02; ``kaiming``:
        uniform in +-1/sqrt(n).

    Raises:
      ValueError: an unknown init, or (at a site) a rank above its smaller dimension.

    Example:
      >>> hydra(rank=2, sequential_rank=4).name
      'hydra'
    """
    check_choice("hydra", "init", init, INITS)
    check_dropout("hydra", dropout)
    ranks = {"parallel": rank, "sequential": rank if sequential_rank is None else sequential_rank}
    for r in ranks.values():
        scaling(r, None)  # raises for a rank below 1

    def leaves(site: Site) -> dict[str, Leaf]:
        kept: dict[str, Leaf] = {}
        for position, r in ranks.items():
            check_rank("hydra", r, site)
            kept |= bottleneck_leaves(site, position, r, bias, f"{position}_")  # type: ignore[arg-type]
        return kept

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        return zero_up(key, site, leaves(site), init)

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Branches:
        how = {"scale": scale, "dropout": dropout}
        return Branches(tuple(Bottleneck(**factors(leaves, f"{p}_"), position=p, **how) for p in ranks))  # type: ignore[arg-type]

    return Method(Branches, leaves, init_leaves, expand)
