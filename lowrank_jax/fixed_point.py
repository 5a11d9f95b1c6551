"""Numbers in fixed point: signed words with a binary point that may differ from layer to layer and move during training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

MAX_BITS = 32


def fixed_point(
    x: jax.Array, word_length: jax.Array | int, fraction_length: jax.Array | int, key: jax.Array | None
) -> jax.Array:
    """Rounds at random, without bias, to multiples of ``2^-FL`` that a signed word of ``WL`` bits holds: the format ``<WL, FL>``.

    Adaptive Precision Training (AdaPT): A dynamic fixed point quantized training approach for DNNs (arXiv 2107.13490). A number between two
    points of the grid becomes the upper one with the probability of its place between them, so that the mean over keys is the number; what
    is outside ``[-2^(WL-1), 2^(WL-1) - 1] / 2^FL`` becomes the nearer end. Points of the grid stay where they are, whatever the key.
    The gradient passes straight through, at the ends too: a weight that has left the range can come back.

    Args:
      x: any shape and floating dtype; NaN stays NaN.
      word_length: WL, 1 to 32; fraction_length: FL, 0 to 32. Integers or traced int32 that broadcast against ``x``, such as
        ``[layers, 1, 1]`` for a stack of weights. A new format needs no new program.
      key: of the rounding; None rounds to the nearest point instead, which is biased: for reading a trained model, not for training.

    Returns:
      The shape and dtype of ``x``. Where the dtype has fewer significant bits than a word, the upper end is the last number below
      ``2^(WL-1)`` that it holds.

    Raises:
      ValueError: a length out of range (traced ones are not looked at), or one that does not broadcast; an integer ``x``.

    Example:
      >>> fixed_point(jnp.array([0.3, 0.5, 9.0]), 4, 2, None).tolist()
      [0.25, 0.5, 1.75]
      >>> sorted(set(fixed_point(jnp.full(100, 0.3), 4, 2, jax.random.key(0)).tolist()))
      [0.25, 0.5]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"fixed_point: x is {x.dtype}; expected a floating dtype.")
    for name, length, least in (("word_length", word_length, 1), ("fraction_length", fraction_length, 0)):
        if isinstance(length, int) and not least <= length <= MAX_BITS:
            raise ValueError(f"fixed_point({name}={length}): expected {least} to {MAX_BITS} bits.")
        shape = jnp.shape(length)
        if len(shape) > x.ndim or any(a not in (1, b) for a, b in zip(shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"fixed_point: {name} of shape {list(shape)} does not broadcast to x of shape {list(x.shape)}; give each layer of a "
                "stack its format as [layers, 1, 1]."
            )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    threshold = jnp.asarray(0.5, wide) if key is None else jax.random.uniform(key, x.shape, wide)
    return _round(x, threshold, jnp.asarray(word_length, jnp.int32), jnp.asarray(fraction_length, jnp.int32))


def power_of_two(exponent: jax.Array) -> jax.Array:
    """``2^exponent`` for int32 from -126 to 127, float32, exact: ``jnp.exp2`` is not, and a grid that is slightly off is no grid.

    Example:
      >>> power_of_two(jnp.array([-2, 0, 31])).tolist()
      [0.25, 1.0, 2147483648.0]
    """
    return jax.lax.bitcast_convert_type((jnp.asarray(exponent, jnp.int32) + 127) << 23, jnp.float32)


@jax.custom_jvp
def _round(x: jax.Array, threshold: jax.Array, word_length: jax.Array, fraction_length: jax.Array) -> jax.Array:
    end = power_of_two(word_length - 1)
    significant = jnp.finfo(x.dtype).nmant + 1
    last = end - jnp.maximum(1, power_of_two(word_length - 1 - significant))
    # Clipped first, so that nothing overflows; the ends are on the grid, so that rounding cannot leave them.
    y = jnp.clip(x.astype(threshold.dtype) * power_of_two(fraction_length), -end, last)
    below = jnp.floor(y)
    # Not floor(y + u): above 2^23 the sum is rounded, and a point of the grid would move.
    return ((below + (threshold < y - below)) * power_of_two(-fraction_length)).astype(x.dtype)


@_round.defjvp
def _straight_through(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _round(*primals), tangents[0]
