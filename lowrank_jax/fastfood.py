"""Random projections of a few numbers into many, which a seed stands for: Fastfood, and the dense and sparse ones that it is cheaper than.

Each is a matrix ``P [D, d]`` with nearly orthonormal columns that is never stored: it is made again wherever ``P x`` or ``P^T y`` is
computed, from a seed of eight bytes (`lowrank_jax.seeded`), and its gradient is exactly that product with the transpose. They are
those of Measuring the Intrinsic Dimension of Objective Landscapes (arXiv 1804.08838).

- ``fastfood``: ``H G Pi H B``, of Fastfood: Approximate Kernel Expansions in Loglinear Time (arXiv 1408.3060). H is the Walsh-Hadamard
  transform of the length L, the next power of two; B are random signs, Pi a permutation, G normal numbers. ``L log L`` additions.
- ``dense``: normal numbers, each column divided by its length. ``2 D d`` operations, and as many random numbers.
- ``sparse``: ``sqrt(D)`` entries of equal size and random sign in each column. ``d sqrt(D)`` additions.

Two things are reconstructions. Pi is a bijection of the index by integer hashing and not drawn from all permutations, which would take
sorting. The entries of a sparse column lie one in each of ``sqrt(D)`` equal stretches, where the papers draw any.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax import seeded
from lowrank_jax.checks import check_choice

Projection = Literal["fastfood", "dense", "sparse"]
MAX_SIZE = 2**31  # of what int32 can index

_AT_ONCE = 2**22  # entries of a dense or sparse matrix made at a time
_RADIX = 64  # of the Hadamard matrices that the transform is multiplied together from
_ROUNDS = 8  # of hashing in a permutation; with 5, halves of a length of 2^8 still move together more than they should


def project(x: jax.Array, seed: jax.Array, size: int, projection: Projection = "fastfood") -> jax.Array:
    """``P x``: a few numbers spread over many, of about the same length.

    Args:
      x: ``[d]``, any floating type. seed: ``[2]`` uint32, which stands for P. size: D, which may be smaller than d.

    Returns:
      ``[D]`` float32, ``E |P x|^2 = |x|^2``; the gradient with respect to ``x`` is `adjoint` of that of the result.

    Raises:
      ValueError: an unknown projection, ``x`` of another shape, or a size outside 1 to 2**31.

    Example:
      >>> import jax.numpy as jnp
      >>> y = project(jnp.array([3.0, 4.0]), jnp.array([1, 2], jnp.uint32), 10_000)
      >>> y.shape, bool(abs(jnp.linalg.norm(y) - 5) < 0.1)
      ((10000,), True)
    """
    if x.ndim != 1 or not x.size:
        raise ValueError(f"project: x has shape {x.shape}: expected [d], at least one number; map over other axes.")
    check_projection(projection, size)
    return _project(x.astype(jnp.float32), seed, size, x.shape[0], projection)


def adjoint(y: jax.Array, seed: jax.Array, dimension: int, projection: Projection = "fastfood") -> jax.Array:
    """``P^T y``, with the same P as `project` of ``dimension`` numbers to ``len(y)``.

    Args:
      y: ``[D]``, any floating type. seed: ``[2]`` uint32. dimension: d.

    Returns:
      ``[d]`` float32.

    Raises:
      ValueError: an unknown projection, ``y`` of another shape, or a dimension below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> seed, x, y = jnp.array([1, 2], jnp.uint32), jnp.arange(3.0), jnp.arange(8.0)
      >>> bool(jnp.allclose(project(x, seed, 8) @ y, x @ adjoint(y, seed, 3), rtol=1e-5))
      True
    """
    if y.ndim != 1 or not y.size:
        raise ValueError(f"adjoint: y has shape {y.shape}: expected [D], at least one number; map over other axes.")
    if dimension < 1:
        raise ValueError(f"adjoint: dimension={dimension}: expected at least 1.")
    check_projection(projection, y.shape[0])
    y = y.astype(jnp.float32)
    return _fastfood_adjoint(y, seed, dimension) if projection == "fastfood" else _take(y, seed, dimension, projection)


def check_projection(projection: str, size: int) -> None:
    """Raises a ValueError that lists the choices, or names the limits, unless numbers can be projected to ``size`` of them so."""
    check_choice("project", "projection", projection, get_args(Projection))
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size}: expected 1 to 2**31, what int32 can index. Project the weight in parts.")


def fwht(x: jax.Array) -> jax.Array:
    """The Walsh-Hadamard transform of the last axis, in natural order and not normalised: ``fwht(fwht(x)) = L x``.

    Args:
      x: ``[..., L]``, L a power of two.

    Raises:
      ValueError: another length.

    Example:
      >>> import jax.numpy as jnp
      >>> fwht(jnp.array([1.0, 2.0, 3.0, 4.0])).tolist()
      [10.0, -2.0, -4.0, 0.0]
    """
    length = x.shape[-1] if x.ndim else 0
    if length < 1 or length & (length - 1):
        raise ValueError(
            f"fwht: x has shape {x.shape}: expected a last axis whose length is a power of two; pad it with zeros."
        )
    batch, left = x.shape[:-1], length
    while left > 1:
        radix = min(_RADIX, left)
        # The lowest digit of the index is transformed and becomes the highest, so that after the last each is in its place again.
        x = jnp.einsum("...ir,rs->...si", x.reshape(*batch, -1, radix), _hadamard(radix), precision="highest")
        x, left = x.reshape(*batch, length), left // radix
    return x


def _hadamard(length: int) -> np.ndarray:
    h = np.ones((1, 1), np.float32)
    while len(h) < length:
        h = np.block([[h, h], [h, -h]])
    return h


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(x: jax.Array, seed: jax.Array, size: int, dimension: int, projection: Projection) -> jax.Array:
    return _fastfood(x, seed, size) if projection == "fastfood" else _spread(x, seed, size, projection)


def _project_forward(x: jax.Array, seed: jax.Array, size: int, dimension: int, projection: Projection) -> tuple:
    return _project(x, seed, size, dimension, projection), seed


def _project_backward(size: int, dimension: int, projection: Projection, seed: jax.Array, g: jax.Array) -> tuple:
    # Written out because the transpose of a gather scatters, and of a scan keeps the matrices: P is made once more instead.
    return adjoint(g, seed, dimension, projection), None


_project.defvjp(_project_forward, _project_backward)


def _fastfood(x: jax.Array, seed: jax.Array, size: int) -> jax.Array:
    bits, short, signs, g = _diagonals(seed, size, x.shape[0])
    # Of a vector that is zero beyond `short` the transform repeats itself with that period: only one period is computed.
    z = fwht(signs * jnp.pad(x, (0, short - x.shape[0])))[_permutation(seeded.fold(seed, 1), bits) & (short - 1)]
    return fwht(g * z)[:size] * lax.rsqrt(size * jnp.sum(g**2))


def _fastfood_adjoint(y: jax.Array, seed: jax.Array, dimension: int) -> jax.Array:
    size = y.shape[0]
    bits, short, signs, g = _diagonals(seed, size, dimension)
    z = (g * fwht(jnp.pad(y, (0, 2**bits - size))))[_permutation(seeded.fold(seed, 1), bits, inverse=True)]
    x = signs * fwht(z.reshape(-1, short).sum(0))
    return x[:dimension] * lax.rsqrt(size * jnp.sum(g**2))


def _diagonals(seed: jax.Array, size: int, dimension: int) -> tuple[int, int, jax.Array, jax.Array]:
    """log2 L, the next power of two from d, the signs B there, and G ``[L]``."""
    bits = (max(size, dimension) - 1).bit_length()
    short = 2 ** (dimension - 1).bit_length()
    return bits, short, _signs(seeded.words(seeded.fold(seed, 0), (short,))), _normal(seeded.fold(seed, 2), (2**bits,))


def _permutation(seed: jax.Array, bits: int, inverse: bool = False) -> jax.Array:
    """Where each of ``2**bits`` places goes, int32: a bijection of the index, so that neither it nor its inverse has to be sorted for.

    Each round multiplies by an odd number and adds one, which only carries upwards, and then brings the upper half of the bits down.
    """
    mask, half = jnp.uint32(2**bits - 1), max(1, (bits + 1) // 2)
    keys = seeded.words(seed, (_ROUNDS, 2))
    x = lax.iota(jnp.uint32, 2**bits)
    for n in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        odd, shift = keys[n, 0] | 1, keys[n, 1]
        if inverse:
            x = ((x ^ x >> half) - shift) * _reciprocal(odd) & mask
        else:
            x = odd * x + shift & mask
            x = x ^ x >> half
    return x.astype(jnp.int32)


def _reciprocal(odd: jax.Array) -> jax.Array:
    """The number whose product with an odd one is 1 modulo 2^32: by Newton's method, which doubles the 3 bits that are right at first."""
    inverse = odd
    for _ in range(4):
        inverse = inverse * (2 - odd * inverse)
    return inverse


def _spread(x: jax.Array, seed: jax.Array, size: int, projection: Projection) -> jax.Array:
    """``P x``, a few columns at a time."""

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, some = part
        if projection == "dense":
            return total + jnp.matmul(some, _dense_columns(seed, start, len(some), size), precision="highest"), None
        place, entries = _sparse_columns(seed, start, len(some), size)
        return total.at[place].add(some[:, None] * entries), None

    count, at_once = _parts(x.shape[0], size, projection)
    parts = jnp.pad(x, (0, count * at_once - x.shape[0])).reshape(count, at_once)
    return lax.scan(add, jnp.zeros(size, jnp.float32), (jnp.arange(count) * at_once, parts))[0]


def _take(y: jax.Array, seed: jax.Array, dimension: int, projection: Projection) -> jax.Array:
    """``P^T y``, a few columns at a time."""
    count, at_once = _parts(dimension, y.shape[0], projection)

    def products(start: jax.Array) -> jax.Array:
        if projection == "dense":
            return jnp.matmul(_dense_columns(seed, start, at_once, y.shape[0]), y, precision="highest")
        place, entries = _sparse_columns(seed, start, at_once, y.shape[0])
        return (entries * y[place]).sum(-1)

    return lax.map(products, jnp.arange(count) * at_once).reshape(-1)[:dimension]


def _parts(dimension: int, size: int, projection: Projection) -> tuple[int, int]:
    """In how many parts the columns are made, and how many are in each."""
    entries = size if projection == "dense" else _count(size)
    at_once = min(dimension, max(1, _AT_ONCE // entries))
    return -(-dimension // at_once), at_once


def _dense_columns(seed: jax.Array, start: jax.Array, count: int, size: int) -> jax.Array:
    """Columns of P as rows, ``[count, D]``."""
    columns = _normal(seeded.fold(seed, 0), (count, size), (start, 0))
    return columns * lax.rsqrt(jnp.sum(columns**2, -1, keepdims=True))


def _sparse_columns(seed: jax.Array, start: jax.Array, count: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Where the entries of some columns of P are, and what they are, each ``[count, sqrt(D)]``."""
    entries = _count(size)
    edges = np.arange(entries + 1) * size // entries
    place, sign = (seeded.words(seeded.fold(seed, n), (count, entries), (start, 0)) for n in (0, 1))
    place = place % jnp.asarray(np.diff(edges), jnp.uint32) + jnp.asarray(edges[:-1], jnp.uint32)
    return place.astype(jnp.int32), _signs(sign) / math.sqrt(entries)


def _count(size: int) -> int:
    """Entries of a sparse column."""
    return max(1, round(math.sqrt(size)))


def _signs(words: jax.Array) -> jax.Array:
    return 1 - 2 * (words >> 31).astype(jnp.float32)


def _normal(seed: jax.Array, shape: tuple[int, ...], start: tuple[jax.Array | int, ...] | None = None) -> jax.Array:
    return math.sqrt(2) * lax.erf_inv(seeded.uniform(seed, shape, start))
