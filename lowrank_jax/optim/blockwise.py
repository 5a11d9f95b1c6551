"""Arrays in eight bits a number: blocks with a scale each and a codebook that keeps orders of magnitude."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

BLOCK = 256
_DECADES = 7


@struct.dataclass
class Quantised:
    """An array in eight bits a number.

    Attributes:
      codes: ``[blocks, block]`` uint8. largest: ``[blocks]`` float32, the largest absolute value of each block.
      shape: of the array. signed: which codebook the codes are of.
    """

    codes: jax.Array
    largest: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    signed: bool = struct.field(pytree_node=False, default=True)


@functools.cache
def codebook(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic map, ascending, float32: seven decades up to 1, finer the larger, and 0.

    8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861). The layout follows bitsandbytes' map from a description of it.

    Example:
      >>> codebook(True)[[0, 127, 255]].tolist(), codebook(False)[[0, 255]].tolist()
      ([-0.9929..., 0.0, 1.0], [0.0, 1.0])
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - _DECADES + 1)
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.asarray(values)).astype(np.float32)


def quantise_blockwise(x: jax.Array, signed: bool = True, block: int = BLOCK) -> Quantised:
    """Each number as the nearest value of `codebook` times the largest absolute value of its block. Zero stays zero.

    Args:
      x: any shape; its numbers in order, the last block filled up with zeros. signed: False: no number is negative.

    Example:
      >>> quantise_blockwise(jnp.array([4.0, -1.0, 0.0]), block=2).largest.tolist()
      [4.0, 0.0]
    """
    flat = jnp.ravel(x).astype(jnp.float32)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    largest = jnp.abs(blocks).max(-1)
    scaled = blocks / jnp.where(largest > 0, largest, 1)[:, None]
    level = _level(jnp.abs(scaled), signed)
    if signed:  # there is no -1
        level = _ZERO + jnp.where(scaled < 0, -jnp.minimum(level, _ZERO), level)
    return Quantised(level.astype(jnp.uint8), largest, jnp.shape(x), signed)


def dequantise_blockwise(q: Quantised) -> jax.Array:
    """The numbers, in the shape they had, float32.

    Example:
      >>> dequantise_blockwise(quantise_blockwise(jnp.array([[4.0, 0.0]]))).tolist()
      [[4.0, 0.0]]
    """
    codes = q.codes.astype(jnp.int32)
    values = _value(jnp.abs(codes - _ZERO), True) * jnp.sign(codes - _ZERO) if q.signed else _value(codes, False)
    values = values * q.largest[:, None]
    return values.ravel()[: math.prod(q.shape)].reshape(q.shape)


# Code of zero in the signed map; the distance from it is a number's level there, as the code itself is in the unsigned one.
_ZERO = 127


def _decades(signed: bool) -> list[tuple[int, int, float]]:
    """For each decade: the level before its first, how many levels it has, and its upper edge."""
    sizes = [2 ** (decade if signed else decade + 1) for decade in range(_DECADES)]
    edges = [10.0 ** (decade - _DECADES + 1) for decade in range(_DECADES)]
    return [(sum(sizes[:n]), size, edge) for n, (size, edge) in enumerate(zip(sizes, edges, strict=True))]


def _level(a: jax.Array, signed: bool) -> jax.Array:
    """The level nearest to each number in [0, 1], int32: 0 for zero, the last for one.

    By arithmetic on the few edges, because a search in a table is twenty times slower on a CPU, and accelerators gather slowly.
    """
    positive = np.append(codebook(signed)[codebook(signed) > 0].astype(np.float64), np.inf)
    middles = (positive[1:] + positive[:-1]) / 2
    level = jnp.zeros(a.shape, jnp.int32)
    for before, size, edge in _decades(signed):
        within = jnp.floor((a * np.float32(1 / edge) - 0.1) * np.float32(size / 0.9)).astype(jnp.int32)
        start = positive[0] / 2 if not before else middles[before - 1]
        level = jnp.where(a > np.float32(start), before + 1 + jnp.clip(within, 0, size - 1), level)
    return jnp.where(a > np.float32(middles[len(positive) - 3]), len(positive) - 1, level)


def _value(level: jax.Array, signed: bool) -> jax.Array:
    """The number that a level stands for, float32."""
    value = jnp.zeros(level.shape, jnp.float32)
    for before, size, edge in _decades(signed):
        within = (level - before).astype(jnp.float32) - 0.5
        value = jnp.where(level > before, (within * np.float32(0.9 / size) + 0.1) * np.float32(edge), value)
    return jnp.where(level > sum(size for _, size, _ in _decades(signed)), 1.0, value)
