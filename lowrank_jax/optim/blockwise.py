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
    book = codebook(signed)
    middles = ((book[1:].astype(np.float64) + book[:-1]) / 2).astype(np.float32)
    scaled = blocks / jnp.where(largest > 0, largest, 1)[:, None]
    return Quantised(jnp.searchsorted(middles, scaled).astype(jnp.uint8), largest, jnp.shape(x), signed)


def dequantise_blockwise(q: Quantised) -> jax.Array:
    """The numbers, in the shape they had, float32.

    Example:
      >>> dequantise_blockwise(quantise_blockwise(jnp.array([[4.0, 0.0]]))).tolist()
      [[4.0, 0.0]]
    """
    values = jnp.asarray(codebook(q.signed))[q.codes] * q.largest[:, None]
    return values.ravel()[: math.prod(q.shape)].reshape(q.shape)
