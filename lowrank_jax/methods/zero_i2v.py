"""ZeroI2V: linear adapters in front of a weight or behind it, which vanish into it after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Bottleneck, InputBottleneck, Leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, method, random_a
from lowrank_jax.methods.bottleneck_leaves import bottleneck_leaves, check_width, factors, width_at, zero_up
from lowrank_jax.sites import Site


@method
def zero_i2v(
    position: Literal["before", "after"] = "after",
    width: int | None = None,
    reduction: float = 4,
    scale: float = 1.0,
    bias: bool = True,
    dropout: float = 0.0,
) -> Method:
    """ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video (arXiv 2310.01324).

    ``Ad(u) = u + s ((u D_1 + c_1) D_2 + c_2)`` with ``D_1 [n, m]``, ``D_2 [m, n]``; the weight gives ``Ad(x) K + b`` (before) or
    ``Ad(x K + b)`` (after). With ``M = I + s D_1 D_2`` and ``c = s (c_1 D_2 + c_2)`` it merges into ``M K`` and ``b + c K``, or into
    ``K M`` and ``b M + c``. For taking image transformers to video, with `lowrank_jax.temporal_shift`, or to any other domain at no
    cost once merged; before a weight it is the one adapter here that changes its input.
    Count: ``2 n m``, with biases ``m + n`` more, where n is the input's (before) or the output's size (after).

    The paper puts adapters before the projections of queries, keys and values and before the first matrix of the MLP, and after the
    attention's output projection and the MLP's second matrix:

        {r".*/(query|key|value|wi)": zero_i2v("before"), r".*/(out|wo)": zero_i2v("after")}

    There the three projections share one adapter, and merge it into one matrix; where a model keeps them apart, each has its own here.

    Args:
      position: before or after the weight. scale: s.
      width: m; None: ``round(n / reduction)``. reduction: of the width, 4 in the paper, ignored where it is given.
      bias: whether there are biases c_1 and c_2; a weight without a bias of its own cannot be merged then.
      dropout: between the two products, during training; 0.1 in the release.

    Raises:
      ValueError: an unknown position, or a width below 1, given or (at a site) left by the reduction.

    Example:
      >>> zero_i2v("before").form.record.delta
      True
    """
    check_choice("zero_i2v", "position", position, ("before", "after"))
    check_width("zero_i2v", width, reduction)
    check_dropout("zero_i2v", dropout)
    place: Any = "before" if position == "before" else "sequential"
    form: Any = InputBottleneck if position == "before" else Bottleneck
    how = {} if position == "before" else {"position": "sequential"}

    def leaves(site: Site) -> dict[str, Leaf]:
        return bottleneck_leaves(site, place, width_at("zero_i2v", site, place, width, reduction), bias)

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        made = zero_up(key, site, leaves(site), "kaiming")
        if bias:  # as a linear layer starts in the release: its bias like its weight
            n, width = made["down"].shape[-2:]
            both = random_a(jax.random.fold_in(key, 1), (*site.batch_shape, n, width))
            made["down_bias"] = both[..., 0, :]
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Bottleneck:
        return form(**factors(leaves), scale=scale, dropout=dropout, **how)

    return Method(form, leaves, init, expand)
