"""What AdaPT keeps of each layer, and the parameters seen through it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.fixed_point import MAX_BITS, fixed_point
from lowrank_jax.sites import flatten, with_leaves


class LayerPrecision(NamedTuple):
    """What is kept of one weight. All but ``gradient`` are of the weight's shape with 1 for the axes of a matrix: one number a layer.

    Attributes:
      word_length, fraction_length: the format ``<WL, FL>``, int32. seen: gradients since the last switch, int32.
      look_back: how many make a window, float32: a moving average. resolution: bins of the histogram, int32.
      norms: sum of the gradients' norms, float32. gradient: sum of the gradients, float32, of the weight's shape.
    """

    word_length: jax.Array
    fraction_length: jax.Array
    seen: jax.Array
    look_back: jax.Array
    resolution: jax.Array
    norms: jax.Array
    gradient: jax.Array


class PrecisionState(NamedTuple):
    """Attributes: count: updates made, int32. layers: by path. strategy: of `push_up`, int32. losses: the last ones, a ring, float32."""

    count: jax.Array  # type: ignore[assignment]
    layers: dict[str, LayerPrecision]
    strategy: jax.Array
    losses: jax.Array


def quantise_params(params: Any, state: PrecisionState, key: jax.Array | None) -> Any:
    """The parameters as the loss sees them: each layer in its format, everything else as it is. Gradients pass straight through.

    Args:
      params: the tree that the state was made for. state: of `adaptive_precision`; in a chain, its own part of the chain's state.
      key: of the rounding, a new one each step; None rounds to the nearest, see `lowrank_jax.fixed_point.fixed_point`.

    Raises:
      ValueError: a layer of the state that is not in the parameters.

    Example:
      >>> from lowrank_jax.optim.precision import adaptive_precision
      >>> params = {"layer": {"kernel": jnp.full((2, 2), 0.3)}}
      >>> quantise_params(params, adaptive_precision(start=(8, 2)).init(params), None)["layer"]["kernel"].tolist()
      [[0.25, 0.25], [0.25, 0.25]]
    """
    new = {}
    for n, (path, (w, layer)) in enumerate(_paired("quantise_params", params, state).items()):
        own = None if key is None else jax.random.fold_in(key, n)
        new[path] = fixed_point(w, layer.word_length, layer.fraction_length, own)
    return with_leaves(params, new)


def mean_word_length(params: Any, state: PrecisionState) -> jax.Array:
    """The paper's measure of size as a word length: the sum over layers of ``WL`` times non-zero weights, over the number of weights.

    Take the parameters that `quantise_params` gives. 32 is float32 without a zero.

    Example:
      >>> from lowrank_jax.optim.precision import adaptive_precision
      >>> params = {"layer": {"kernel": jnp.eye(4)}}
      >>> float(mean_word_length(params, adaptive_precision(start=(8, 4)).init(params)))
      2.0
    """
    bits, numbers = jnp.zeros(()), 0
    for w, layer in _paired("mean_word_length", params, state).values():
        bits, numbers = bits + _bits(w, layer), numbers + w.size
    return bits / numbers


def sparsity_penalty(params: Any, state: PrecisionState, l1: float, words: float = 0.0) -> jax.Array:
    """A term for the loss: ``l1`` times the sum of absolute weights, and ``words`` times each layer's ``WL / 32`` times share of non-zeros.

    The first makes weights that rounding turns into zeros; the second has no gradient and reaches training through the strategy alone,
    which watches the loss. A reconstruction: that there are two such terms is all that is known of them.

    Example:
      >>> from lowrank_jax.optim.precision import adaptive_precision
      >>> params = {"layer": {"kernel": jnp.eye(4)}}
      >>> float(sparsity_penalty(params, adaptive_precision(start=(8, 4)).init(params), l1=0.5, words=4.0))
      2.25
    """
    total = jnp.zeros(())
    for w, layer in _paired("sparsity_penalty", params, state).values():
        # Not jnp.abs, whose gradient at 0 is 1 here: it would push every zero one way.
        size = jnp.sum(w * jax.lax.stop_gradient(jnp.sign(w)), dtype=jnp.float32)
        total += l1 * size + words * _bits(w, layer) / (MAX_BITS * w.size / layer.word_length.size)
    return total


def _bits(w: jax.Array, layer: LayerPrecision) -> jax.Array:
    return jnp.sum(jnp.where(w != 0, layer.word_length, 0), dtype=jnp.float32)


def _paired(what: str, params: Any, state: PrecisionState) -> dict[str, tuple[jax.Array, LayerPrecision]]:
    flat = flatten(params)
    missing = [path for path in state.layers if path not in flat]
    if missing:
        raise ValueError(
            f"{what}: the state holds {missing[0]}, which is not in the parameters. Give the parameters that it was made for."
        )
    # Sorted, as jit leaves them: a layer's key must not depend on where the state comes from.
    return {path: (flat[path], layer) for path, layer in sorted(state.layers.items())}
