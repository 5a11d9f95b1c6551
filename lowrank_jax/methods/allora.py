"""ALLoRA: a LoRA without scale and dropout, in which outputs that have hardly moved learn faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import AdaptiveLowRank, Leaf, LowRank
from lowrank_jax.methods.base import Context, Given, Leaves, Method, method, scaling
from lowrank_jax.methods.lora_pair import pair_leaves, zero_b
from lowrank_jax.methods.ranks import Rank, largest
from lowrank_jax.sites import Site


@method
def allora(rank: Rank = 8, eta: float = 1.0, init: Literal["kaiming", "gaussian"] = "kaiming") -> Method:
    """ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws (arXiv 2410.09692).

    ``y = x K + (x a) b`` with ``a [n_in, r]`` and ``b [r, n_out]`` trained, ``b`` zero at first; no scale, no dropout. On the way back
    the gradient ``g_j`` of output j reaches the factors as ``g_j / sqrt(||a b_j|| + 1 / eta^2)``: multiplied by ``eta`` at first, where
    ``b = 0`` holds back an ordinary LoRA, and by less as the output's update grows. The input's gradient is untouched, so layers do not
    act on each other's rates. For short training on little data. It merges like any LoRA, and needs no ``alpha`` for that.
    Count: ``r * (n_in + n_out)``.

    An optimizer that divides gradients by their size (Adam) undoes a factor that stays the same: there the rates matter for ``a``, where
    outputs mix, and as they change; with SGD ``eta`` stands for ``alpha / r``. The norm (not its square) under the root and the untouched
    input gradient are reconstructed from descriptions of the paper's section 4.2; there is no release to compare with.

    Args:
      rank: r, or one for each element of a stacked weight (layers of a scan, flattened); the stack is padded to the largest.
      eta: the rate of an output that has not moved, relative to the optimizer's; above 0.
      init: ``kaiming``: ``a`` uniform in +-1/sqrt(n_in); ``gaussian``: normal with standard deviation 1/r.

    Raises:
      ValueError: an unknown init, ``eta`` of 0 or less, or (at a site) a rank above its smaller dimension or a tuple of ranks of the wrong
        length.

    Example:
      >>> allora(rank=4).exact_init
      True
    """
    check_choice("allora", "init", init, ("kaiming", "gaussian"))
    if not eta > 0:
        raise ValueError(f"allora(eta={eta}): expected a positive rate.")
    scaling(largest(rank), None)  # raises for a rank below 1

    def leaves(site: Site) -> dict[str, Leaf]:
        return pair_leaves("allora", rank, site)

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        return zero_b(key, site, rank, init)

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> AdaptiveLowRank:
        return AdaptiveLowRank(LowRank(leaves["a"], leaves["b"]), eta=eta)

    return Method(AdaptiveLowRank, leaves, init_leaves, expand)
