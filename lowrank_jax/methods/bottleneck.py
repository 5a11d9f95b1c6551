"""Bottleneck adapters: a small network with a nonlinearity, beside a weight or behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Bottleneck, Leaf, NonlinearBottleneck
from lowrank_jax.forms.bottleneck import ACTIVATIONS
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, method
from lowrank_jax.methods.bottleneck_leaves import (
    bottleneck_leaves,
    check_width,
    factors,
    random_down,
    width_at,
    zero_up,
)
from lowrank_jax.sites import Site


@method
def bottleneck(
    width: int | None = None,
    reduction: float = 16,
    activation: Literal["gelu", "relu", "silu", "tanh"] | None = "gelu",
    position: Literal["parallel", "sequential"] = "sequential",
    scale: float = 1.0,
    bias: bool = True,
    dropout: float = 0.0,
    init: Literal["gaussian", "zero_up"] = "gaussian",
) -> Method:
    """Bottleneck adapters, as in Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers (arXiv 2312.03694).

    ``y = z + s (act(u D + c) U + e)`` with ``z = x K + b``, ``D [n, m]``, ``U [m, n_out]`` and ``u = z`` (sequential, ``n = n_out``) or
    ``u = x`` (parallel, ``n = n_in``). For transformers of audio and vision, where adapters with a nonlinearity do better than low-rank
    updates of the same size. The nonlinearity cannot be merged: the adapter stays beside the weight, and so does its cost.
    Count: ``m (n + n_out)``, with biases ``m + n_out`` more.

    The papers put adapters on the output of a sub-layer. Sequential ones on the second matrix of the MLP are Pfeiffer's placement, those
    and others on the output projection of attention Houlsby's (Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751).
    Parallel here is beside one weight; beside a whole MLP, as in AdaptFormer (arXiv 2205.13535), it would span two.

    Args:
      width: m; None: ``round(n / reduction)``, which is how the paper gives it. reduction: of the width, ignored where it is given.
      activation: act; None: a linear adapter, which merges.
      position: what it reads, as above. scale: s. dropout: on the narrow activation, during training.
      bias: whether there are biases c ``[m]`` and e ``[n_out]``; a linear adapter with them merges into a weight that has a bias.
      init: ``gaussian``: D and U normal with deviation 0.02, biases zero, so the output starts near the base's; ``zero_up``: D uniform in
        +-1/sqrt(n), U zero, so it starts at the base's. The release writes zeros into both, but what it then trains is the gaussian that
        loading the checkpoint puts in their place: from zeros neither D nor U would ever get a gradient.

    Raises:
      ValueError: an unknown choice, or a width below 1, given or (at a site) left by the reduction.

    Example:
      >>> bottleneck(reduction=8, position="parallel").form.record.delta, bottleneck(activation=None).form.record.delta
      (False, True)
    """
    check_width("bottleneck", width, reduction)
    if activation is not None:
        check_choice("bottleneck", "activation", activation, tuple(ACTIVATIONS))
    check_choice("bottleneck", "position", position, ("parallel", "sequential"))
    check_choice("bottleneck", "init", init, ("gaussian", "zero_up"))
    check_dropout("bottleneck", dropout)
    form: Any = Bottleneck if activation is None else NonlinearBottleneck
    how = {} if activation is None else {"activation": activation}

    def leaves(site: Site) -> dict[str, Leaf]:
        m = width_at("bottleneck", site, position, width, reduction)
        return bottleneck_leaves(site, position, m, bias)

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        kept = leaves(site)
        if init == "zero_up":
            return zero_up(key, site, kept, "kaiming")
        made = {name: jnp.zeros((*site.batch_shape, *leaf.shape)) for name, leaf in kept.items()}
        keys = dict(zip(("down", "up"), jax.random.split(key), strict=True))
        return made | {name: random_down(k, made[name].shape, "normal") for name, k in keys.items()}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Bottleneck:
        return form(**factors(leaves), scale=scale, dropout=dropout, position=position, **how)

    return Method(form, leaves, init_leaves, expand, exact_init=init == "zero_up")
