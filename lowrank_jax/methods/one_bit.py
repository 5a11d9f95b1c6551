"""1-bit adapters: factors that are trained as one bit a number, and stored so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.checks import check_choice
from lowrank_jax.codebook import pack, packed_size, quantise, unpack
from lowrank_jax.forms import Form, Leaf, LowRank, NonlinearBottleneck
from lowrank_jax.forms.bottleneck import ACTIVATIONS
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    check_rank,
    method,
    random_a,
    scaling,
)
from lowrank_jax.sites import Site

Activation = Literal["relu", "gelu", "silu", "tanh"]
_UP_DEVIATION = 1e-3


@method
def one_bit(
    rank: int = 32,
    alpha: float | None = None,
    bits: int = 1,
    activation: Activation | None = None,
    dropout: float = 0.0,
) -> Method:
    """Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (arXiv 2307.16867).

    A LoRA, or with ``activation`` a small network beside the weight (AdaptFormer), whose factors take ``2^bits`` values only:
    ``y = x K + s * (x Q(a)) Q(b)`` with ``a [n_in, r]`` and ``b [r, n_out]`` trained, ``Q(w) = code((w - mean) / (sd + 1e-5)) * sd + mean``
    with mean and deviation of the whole factor, and for one bit ``code = +-0.6745``, the median of half a normal. The choice of a code
    passes the gradient straight through; mean and deviation are differentiated. For the smallest file of a task: `lowrank_jax.compact`
    packs the codes into bytes, with two float32 a factor, and the result acts the same. Training needs as much as LoRA does.
    Count: ``r * (n_in + n_out)``; stored: ``bits`` of each, and 8 bytes a factor.

    ``b`` starts tiny and not at zero, which has no deviation to divide by: so the output starts near the base's and not at it. The
    paper's AdaptFormer is beside a whole MLP; here it is beside one weight. Merging gives up the storage: ``K`` is no matrix of bits.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank. The paper tunes s by task.
      bits: of each number, 1 to 8.
      activation: between the factors; None: LoRA, which can be merged. The paper's is ``relu``.
      dropout: during training; on the input (LoRA) or between the factors (with an activation). The paper's is 0.1, between the factors.

    Raises:
      ValueError: an unknown activation, bits outside 1 to 8, or (at a site) a rank above its smaller dimension.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((64, 32))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.one_bit(rank=8)}))
      >>> lr.count(adapters).bytes, lr.count(lr.compact(adapters)).bytes
      (3072, 112)
    """
    scale = _scale("one_bit", rank, alpha, bits, activation, dropout)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("one_bit", rank, site)
        return {"a": a_leaf(site, rank), "b": b_leaf(site, rank)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a_key, b_key = jax.random.split(key)
        # Two deviations on each side are all of it.
        b = _UP_DEVIATION * jax.random.truncated_normal(b_key, -2, 2, (*site.batch_shape, rank, site.n_out))
        return {"a": random_a(a_key, (*site.batch_shape, site.n_in, rank)), "b": b}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Form:
        return _form(quantise(leaves["a"], bits), quantise(leaves["b"], bits), scale, activation, dropout)

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        packed = one_bit_packed(rank, alpha, bits, activation)
        return packed, {name: np.asarray(value) for name, value in _packed(leaves, bits).items()}

    return Method(_form_type(activation), leaves, init, expand, compact=compact, exact_init=False)


@method
def one_bit_packed(
    rank: int = 32, alpha: float | None = None, bits: int = 1, activation: Activation | None = None
) -> Method:
    """What `lowrank_jax.compact` makes of `one_bit`: nothing to train, ``bits`` a number.

    At a site: ``a_codes`` and ``b_codes``, uint8, and ``a_moments`` and ``b_moments [2]``, mean and deviation, float32. They become
    factors in each forward pass.

    Args:
      rank, alpha, bits, activation: as in `one_bit`.

    Example:
      >>> one_bit_packed(rank=8).name
      'one_bit_packed'
    """
    scale = _scale("one_bit_packed", rank, alpha, bits, activation, 0.0)
    trained = one_bit(rank, alpha, bits, activation)

    def shapes(site: Site) -> dict[str, tuple[int, int]]:
        return {"a": (site.n_in, rank), "b": (rank, site.n_out)}

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("one_bit_packed", rank, site)
        kept = {}
        for name, shape in shapes(site).items():
            size = packed_size(shape[0] * shape[1], bits)
            kept[f"{name}_codes"] = Leaf((size,), ("",), trains=None, dtype=jnp.uint8)
            kept[f"{name}_moments"] = Leaf((2,), ("",), trains=None, dtype=jnp.float32)
        return kept

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        return _packed(trained.init(key, site, given), bits)

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Form:
        a, b = (unpack(leaves[f"{n}_codes"], leaves[f"{n}_moments"], s, bits) for n, s in shapes(site).items())
        return _form(a, b, scale, activation, 0.0)

    return Method(trained.form, leaves, init, expand, exact_init=False)


def _scale(
    name: str, rank: int, alpha: float | None, bits: int, activation: Activation | None, dropout: float
) -> float:
    if activation is not None:
        check_choice(name, "activation", activation, tuple(ACTIVATIONS))
    check_dropout(name, dropout)
    if not 1 <= bits <= 8:
        raise ValueError(f"{name}(bits={bits}): expected 1 to 8 bits a number.")
    return scaling(rank, alpha)


def _packed(leaves: Mapping[str, Any], bits: int) -> dict[str, jax.Array]:
    kept = {}
    for name in ("a", "b"):
        kept[f"{name}_codes"], kept[f"{name}_moments"] = pack(leaves[name], bits)
    return kept


def _form_type(activation: Activation | None) -> type:
    return LowRank if activation is None else NonlinearBottleneck


def _form(a: jax.Array, b: jax.Array, scale: float, activation: Activation | None, dropout: float) -> Form:
    if activation is None:
        return LowRank(a, b, scale=scale, dropout=dropout)
    return NonlinearBottleneck(a, b, scale=scale, dropout=dropout, activation=activation)
