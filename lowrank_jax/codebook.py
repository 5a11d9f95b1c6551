"""Matrices in a few bits a number: the codebook of a normal distribution, training through it, and packing into bytes."""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 500
_EPSILON = 1e-5  # in the normalisation only: the paper multiplies by the plain deviation again


@functools.cache
def levels(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``2^bits`` codes of a standard normal and the ``2^bits - 1`` boundaries between their cells, float32.

    A code is the median of its cell, which minimises the mean absolute error, and a boundary is halfway between its neighbours; the two
    rules alternate, from the quantiles on.

    Example:
      >>> [round(float(code), 4) for code in levels(1)[0]]
      [-0.6745, 0.6745]
    """
    normal, n = NormalDist(), 2**bits
    codes = np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    for _ in range(_ROUNDS):
        below = np.array([0.0, *map(normal.cdf, _halfway(codes)), 1.0])
        codes = np.array([normal.inv_cdf(p) for p in (below[1:] + below[:-1]) / 2])
        codes = (codes - codes[::-1]) / 2  # odd to the last bit
    return codes.astype(np.float32), _halfway(codes).astype(np.float32)


def quantise(w: jax.Array, bits: int) -> jax.Array:
    """A matrix of at most ``2^bits`` different values near ``w``: ``code((w - mean) / (sd + 1e-5)) * sd + mean``.

    Mean and (unbiased) deviation are those of the whole matrix. Differentiable: the choice of a code passes the gradient straight
    through, mean and deviation are differentiated as they are.

    Args:
      w: ``[..., m, n]``; every matrix of a batch is on its own.

    Returns:
      The shape of ``w``, float32.

    Example:
      >>> len(set(quantise(jnp.arange(6.0).reshape(2, 3), 1).ravel().tolist()))
      2
    """
    mean, deviation = _moments(w)
    return _nearest(_normalised(w), bits) * deviation + mean


def pack(w: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """What `quantise` makes of a matrix, in bytes.

    Returns:
      The codes ``[..., packed_size(m * n, bits)]`` uint8, first number in the highest bits, and mean and deviation ``[..., 2]`` float32.
    """
    mean, deviation = _moments(w)
    codes = _code(_normalised(w), bits).reshape(*w.shape[:-2], -1, 1)
    ones_and_zeros = codes >> jnp.arange(bits)[::-1] & 1
    packed = jnp.packbits(ones_and_zeros.reshape(*w.shape[:-2], -1).astype(jnp.uint8), axis=-1)
    return packed, jnp.concatenate([mean, deviation], -1)[..., 0, :]


def unpack(packed: jax.Array, moments: jax.Array, shape: tuple[int, int], bits: int) -> jax.Array:
    """The quantised matrices ``[..., *shape]`` float32; inverse of `pack`.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (5, 3))
      >>> bool((unpack(*pack(w, 2), (5, 3), 2) == quantise(w, 2)).all())
      True
    """
    numbers = shape[0] * shape[1]
    ones_and_zeros = jnp.unpackbits(packed, axis=-1, count=numbers * bits).reshape(*packed.shape[:-1], *shape, bits)
    codes = (ones_and_zeros.astype(jnp.int32) << jnp.arange(bits)[::-1]).sum(-1)
    mean, deviation = (moments[..., n, None, None].astype(jnp.float32) for n in (0, 1))
    return jnp.asarray(levels(bits)[0])[codes] * deviation + mean


def packed_size(numbers: int, bits: int) -> int:
    """Bytes of ``numbers`` codes."""
    return -(-numbers * bits // 8)


def _halfway(codes: np.ndarray) -> np.ndarray:
    return (codes[1:] + codes[:-1]) / 2


def _moments(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = jnp.asarray(w, jnp.float32)
    return wide.mean((-2, -1), keepdims=True), wide.std((-2, -1), ddof=1, keepdims=True)


def _normalised(w: jax.Array) -> jax.Array:
    mean, deviation = _moments(w)
    return (w - mean) / (deviation + _EPSILON)


def _code(z: jax.Array, bits: int) -> jax.Array:
    # On a boundary the upper code: a sign function would make a level of its own there.
    return jnp.searchsorted(levels(bits)[1], z, side="right", method="compare_all")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _nearest(z: jax.Array, bits: int) -> jax.Array:
    return jnp.asarray(levels(bits)[0])[_code(z, bits)]


@_nearest.defjvp
def _straight_through(bits: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _nearest(primals[0], bits), tangents[0]
