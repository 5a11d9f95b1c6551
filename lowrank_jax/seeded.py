"""Random numbers that a seed of eight bytes stands for: frozen matrices that are made again instead of stored.

A method whose frozen part is random keeps the seed and makes the numbers where they are used, in every forward and every backward
pass. So they must be cheap, and they are part of the file format: the same bits on every device, mesh, JAX release and setting of
JAX's own generators. Each number is an integer hash of the seed and its coordinates, so any part of a matrix can be made alone, and a
smaller matrix is the corner of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: its multiples spread evenly


def seeds(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Fresh seeds, ``[*shape, 2]`` uint32."""
    return jax.random.bits(key, (*shape, 2), jnp.uint32)


def fold(seed: jax.Array, number: int) -> jax.Array:
    """Another seed, for another purpose."""
    return _mix(seed + jnp.uint32((number + 1) * _GOLDEN & 0xFFFFFFFF))


def words(seed: jax.Array, shape: tuple[int, ...], start: Sequence[int | jax.Array] | None = None) -> jax.Array:
    """Uniform 32-bit words: the part of an endless array that begins at ``start``.

    Args:
      seed: ``[2]`` uint32. start: coordinates of the first element, by axis; None: all zero.

    Returns:
      ``shape`` uint32.

    Example:
      >>> seed = jnp.array([1, 2], jnp.uint32)
      >>> bool((words(seed, (5, 7))[3:, 2:] == words(seed, (2, 5), (3, 2))).all())
      True
    """
    total = jnp.uint32(0)
    for axis, size in enumerate(shape):
        at = jnp.uint32(0) if start is None else jnp.asarray(start[axis]).astype(jnp.uint32)
        key = _mix(lax.iota(jnp.uint32, size) + at ^ seed[0])
        key = _mix(key + seed[1] + jnp.uint32(axis * _GOLDEN & 0xFFFFFFFF))
        total = total + key.reshape(-1, *[1] * (len(shape) - axis - 1))
    return _mix(total)


def uniform(seed: jax.Array, shape: tuple[int, ...], start: Sequence[int | jax.Array] | None = None) -> jax.Array:
    """Float32 numbers uniform in (-1, 1), symmetric about zero; the arguments of `words`.

    Example:
      >>> bool(jnp.abs(uniform(jnp.array([1, 2], jnp.uint32), (100, 100)).mean()) < 0.02)
      True
    """
    # 23 bits and a half: exact in float32, and zero, which would have no mirror image, is not among them.
    return (words(seed, shape, start) >> 9).astype(jnp.float32) * 2.0**-22 + (2.0**-23 - 1)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each input bit flips each output bit about half of the time.

    Shifts and factors of the integer hash with the least measured bias in Chris Wellons' "Prospecting for Hash Functions".
    """
    x = (x ^ x >> 16) * jnp.uint32(0x21F0AAAD)
    x = (x ^ x >> 15) * jnp.uint32(0xD35A2D97)
    return x ^ x >> 15
