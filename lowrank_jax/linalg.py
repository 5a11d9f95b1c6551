"""Truncated singular value decompositions and spectra of kernels, batched over leading axes.

The randomised decomposition follows "Finding structure with randomness" (Halko, Martinsson, Tropp,
arXiv 0909.4061): sketch the range, refine it by subspace iteration with an orthonormal basis after every product, decompose
the small projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

SvdMethod = Literal["randomized", "exact"]

OVERSAMPLE = 16
POWER_ITERATIONS = 4


def range_finder(
    key: jax.Array,
    w: jax.Array,
    rank: int,
    oversample: int = OVERSAMPLE,
    power_iterations: int = POWER_ITERATIONS,
) -> jax.Array:
    """An orthonormal basis that holds nearly all of the leading ``rank`` left singular directions.

    Args:
      key: PRNG key of the sketch. Every matrix of a batch gets the same sketch, so a batch equals its matrices
        one by one.
      w: ``[..., m, n]``, any real dtype.
      rank: how many directions are wanted, at most ``min(m, n)``.
      oversample: further columns of the sketch; cut so that the basis has at most ``min(m, n)`` columns.
      power_iterations: products with ``w^T`` then ``w`` after the first sketch.

    Returns:
      ``[..., m, min(rank + oversample, m, n)]`` in float32 (float64 for a float64 input).

    Raises:
      ValueError: if ``rank`` is not between 1 and ``min(m, n)``.

    Example:
      >>> q = range_finder(jax.random.key(0), jnp.diag(jnp.array([3.0, 2.0, 0.0])), rank=2, oversample=0)
      >>> q.shape
      (3, 2)
    """
    _check_rank(w, rank)
    w = _widen(w)
    q = qr(_sketched(key, w, rank + oversample))[0]
    for _ in range(power_iterations):
        q = qr(_matmul(w, qr(_matmul(_t(w), q))[0]))[0]
    return q


def directions(key: jax.Array, w: jax.Array, rank: int, power_iterations: int = POWER_ITERATIONS) -> jax.Array:
    """The leading ``rank`` left singular vectors, where no singular values are wanted.

    Subspace iteration as in `range_finder`, with `orthonormal` in place of QR and no last decomposition of a projection: a fraction of what
    `svd` costs for a matrix of some hundred columns. Directions a thousand times weaker than the first may be missed.

    Args:
      key, w, rank, power_iterations: as of `range_finder`.

    Returns:
      ``[..., m, rank]``, orthonormal columns, as `left_singular_vectors`.

    Raises:
      ValueError: if ``rank`` is not between 1 and ``min(m, n)``.

    Example:
      >>> q = directions(jax.random.key(0), jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
      >>> print(jnp.abs(q).round(2))
      [[0. 0.]
       [1. 0.]
       [0. 1.]]
    """
    _check_rank(w, rank)
    w = _of_order_one(_widen(w))
    seen = _sketched(key, w, rank + OVERSAMPLE)
    for _ in range(power_iterations):
        # One pass: columns near enough to orthogonal that rounding in the next product does not lose the weaker ones.
        seen = _matmul(w, _cholesky_qr(_of_order_one(_matmul(_t(w), seen))))
    return left_singular_vectors(seen, rank)


def left_singular_vectors(x: jax.Array, rank: int) -> jax.Array:
    """The leading ``rank`` left singular vectors of a matrix of few columns, by its Gram matrix.

    Args:
      x: ``[..., m, k]``, any real dtype. rank: between 1 and ``min(m, k)``.

    Returns:
      ``[..., m, rank]`` in float32 (float64 for a float64 input), the stronger first, the entry of largest magnitude in each column
      positive.

    Raises:
      ValueError: if ``rank`` is out of range.

    Example:
      >>> print(left_singular_vectors(jnp.array([[1.0, 0.0], [0.0, 3.0]]), 1).round(2))
      [[0.]
       [1.]]
    """
    _check_rank(x, rank)
    x = _of_order_one(_widen(x))
    turned = each(lambda gram: jnp.linalg.eigh(gram)[1], _matmul(_t(x), x))
    found = orthonormal(_matmul(x, turned[..., ::-1][..., :rank]))
    return found * signs(found)


def orthonormal(x: jax.Array) -> jax.Array:
    """Orthonormal columns that span those of a matrix, whatever its rank.

    By "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices" (arXiv 1809.11085): products of tall matrices
    and decompositions of ``[k, k]`` only, so several times faster than Householder's QR, and rows that are divided over a mesh stay
    where they are.

    Args:
      x: ``[..., m, k]``, float32 or float64, ``m >= k``.

    Returns:
      As ``x``. The span is that of ``x`` to some 1e-6; what ``x`` is short of is made up.

    Raises:
      ValueError: if there are more columns than rows.

    Example:
      >>> print(orthonormal(jnp.zeros((3, 2))))
      [[1. 0.]
       [0. 1.]
       [0. 0.]]
    """
    m, k = x.shape[-2:]
    if k > m:
        raise ValueError(f"A matrix of {m} rows has at most {m} orthonormal columns, not {k}: transpose it.")
    x = _of_order_one(x)
    size = jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))
    x = x + jnp.where(size > 0, 1e-6 * size, 1) * jnp.eye(m, k, dtype=x.dtype)
    for _ in range(4):
        x = _cholesky_qr(x)
    return _cholesky_qr(x, shift=False)


def _cholesky_qr(x: jax.Array, shift: bool = True) -> jax.Array:
    """One pass: the columns of ``x`` turned into nearly orthogonal ones; of the weakest combinations only a hundredfold stronger.

    Without the shift in full, for columns that are nearly orthogonal already: rounding makes the Gram matrix of others indefinite.
    """
    k = x.shape[-1]
    gram = _matmul(_t(x), x)
    if shift:
        norm = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)  # at least the largest eigenvalue
        above_rounding = 4 * jnp.finfo(x.dtype).eps * k**0.5 * norm + jnp.finfo(x.dtype).tiny ** 0.5
        gram += above_rounding[..., None, None] * jnp.eye(k, dtype=x.dtype)
    return _matmul(x, _t(each(_inverse_cholesky, gram)))


def _sketched(key: jax.Array, w: jax.Array, width: int) -> jax.Array:
    """``w`` times a random matrix of so many columns, at most the smaller dimension of ``w``."""
    m, n = w.shape[-2:]
    return _matmul(w, jax.random.normal(key, (n, min(width, m, n)), w.dtype))


def _of_order_one(x: jax.Array) -> jax.Array:
    """Squares of a tiny or huge matrix would leave float32's range."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    return x / jnp.where(largest > 0, largest, 1)


def _inverse_cholesky(gram: jax.Array) -> jax.Array:
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return jax.lax.linalg.triangular_solve(jnp.linalg.cholesky(gram), eye, left_side=True, lower=True)


def svd(
    w: jax.Array,
    rank: int,
    *,
    key: jax.Array | None = None,
    method: SvdMethod = "randomized",
    oversample: int = OVERSAMPLE,
    power_iterations: int = POWER_ITERATIONS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading ``rank`` singular triplets, ``w ~ u @ diag(s) @ vt``.

    The entry of largest magnitude in each column of ``u`` is positive, so the factors are a function of ``w``
    and ``key`` alone and can be made again instead of stored.

    Args:
      w: ``[..., m, n]``, any real dtype; a bfloat16 kernel is decomposed in float32.
      rank: between 1 and ``min(m, n)``.
      key: PRNG key of the sketch, needed by ``"randomized"``.
      method: ``"randomized"`` (cost ``m n rank`` a product) or ``"exact"`` (a full decomposition, cost
        ``m n min(m, n)``).
      oversample, power_iterations: see `range_finder`.

    Returns:
      ``u [..., m, rank]``, ``s [..., rank]`` descending, ``vt [..., rank, n]``, in float32 (float64 for a float64
      input).

    Raises:
      ValueError: if ``rank`` is out of range, ``method`` unknown, or the key absent.

    Example:
      >>> u, s, vt = svd(jnp.array([[0.0, -3.0], [2.0, 0.0]]), 1, key=jax.random.key(0))
      >>> [round(float(value), 4) for value in (u[0, 0], s[0], vt[0, 1])]
      [1.0, 3.0, -1.0]
    """
    _check_rank(w, rank)
    if method not in ("randomized", "exact"):
        raise ValueError(f"Unknown svd method {method!r}: expected 'randomized' or 'exact'.")
    if method == "randomized" and key is None:
        raise ValueError("A randomized svd needs a key for its sketch: pass key=, or method='exact'.")
    w = _widen(w)
    # A sketch as wide as the matrix saves nothing over the decomposition itself.
    if method == "exact" or rank + oversample >= min(w.shape[-2:]):
        u, s, vt = _exact(w)
    else:
        assert key is not None
        # The basis is sought on the shorter side, so that the tall QR of the projection happens once only.
        flip = w.shape[-2] > w.shape[-1]
        long = _t(w) if flip else w
        q = range_finder(key, long, rank, oversample, power_iterations)
        # long^T q = v_basis r, so q q^T long = q r^T v_basis^T and only the small r^T is decomposed.
        v_basis, r = qr(_matmul(_t(long), q))
        u, s, vt = _exact(_t(r))
        u, vt = _matmul(q, u), _matmul(vt, _t(v_basis))
        if flip:
            u, vt = _t(vt), _t(u)
    sign = signs(u[..., :rank])
    return u[..., :rank] * sign, s[..., :rank], vt[..., :rank, :] * _t(sign)


def spectrum(w: jax.Array) -> jax.Array:
    """All singular values, descending, exactly.

    Args:
      w: ``[..., m, n]``, any real dtype.

    Returns:
      ``[..., min(m, n)]`` in float32 (float64 for a float64 input).

    Example:
      >>> print(spectrum(jnp.diag(jnp.array([1.0, 4.0]))))
      [4. 1.]
    """
    return each(lambda m: jnp.linalg.svd(m, compute_uv=False), _widen(w))


def captured_energy(w: jax.Array, rank: int, *, key: jax.Array | None = None, method: SvdMethod = "exact") -> jax.Array:
    """The share of the squared Frobenius norm that the leading ``rank`` singular directions hold.

    Unchanged when ``w`` is multiplied by a non-zero number. A zero matrix is held wholly by any rank: 1.

    Args:
      w: ``[..., m, n]``, any real dtype.
      rank: between 1 and ``min(m, n)``.
      key, method: see `svd`. The randomised figure is a lower bound, tight where the spectrum decays; on a
        flat one (576-wide Gaussian noise, rank 32) it was 3% low.

    Returns:
      ``[...]``, between 0 and 1.

    Raises:
      ValueError: as `svd`.

    Example:
      >>> print(f"{captured_energy(jnp.diag(jnp.array([3.0, 4.0])), 1):.2f}")
      0.64
    """
    _check_rank(w, rank)
    w = _widen(w)
    # Scaled to a largest entry of one first: the squares of a tiny or huge kernel leave float32's range.
    largest = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True)
    w = w / jnp.where(largest > 0, largest, 1)
    s = spectrum(w)[..., :rank] if method == "exact" else svd(w, rank, key=key, method=method)[1]
    total = jnp.sum(w**2, axis=(-2, -1))
    return jnp.where(total > 0, jnp.minimum(jnp.sum(s**2, axis=-1) / jnp.where(total > 0, total, 1), 1), 1)


def signs(columns: jax.Array) -> jax.Array:
    """The sign of the entry of largest magnitude in each column of ``[..., m, k]``, as ``[..., 1, k]``.

    Example:
      >>> print(signs(jnp.array([[1.0, 2.0], [-3.0, 0.5]])))
      [[-1.  1.]]
    """
    largest = jnp.argmax(jnp.abs(columns), axis=-2, keepdims=True)
    return jnp.where(jnp.take_along_axis(columns, largest, axis=-2) < 0, -1, 1).astype(columns.dtype)


def each(f: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """``f`` of every matrix of ``x [..., m, n]``; results have the batch axes of ``x`` in front.

    On a CPU one after another: jaxlib 0.10 splits a batched LAPACK call over the threads that run the program and waits for them, so as
    many such calls at once as there are threads wait for each other forever. Elsewhere as a batch.

    Example:
      >>> each(lambda m: jnp.linalg.qr(m)[0], jnp.stack([jnp.eye(2)] * 3)).shape
      (3, 2, 2)
    """
    if x.ndim == 2:
        return f(x)
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    out = jax.lax.platform_dependent(flat, cpu=lambda flat: jax.lax.map(f, flat), default=jax.vmap(f))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), out)


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``q [..., m, k]`` and ``r [..., k, n]`` of every matrix, see `each`."""
    return each(lambda m: tuple(jnp.linalg.qr(m)), x)


def _exact(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return each(lambda m: tuple(jnp.linalg.svd(m, full_matrices=False)), x)


def _check_rank(w: jax.Array, rank: int) -> None:
    if w.ndim < 2:
        raise ValueError(f"Expected a matrix or a batch of matrices [..., m, n], got shape {w.shape}.")
    if not 1 <= rank <= min(w.shape[-2:]):
        raise ValueError(
            f"Rank {rank} is out of range for matrices of shape {w.shape[-2:]}: "
            f"expected 1 to {min(w.shape[-2:])}. Choose a smaller rank for this site."
        )


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    # A TPU multiplies float32 as bfloat16 unless told otherwise; that is too coarse for an orthonormal basis.
    return jnp.matmul(a, b, precision="highest")


def _t(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def _widen(w: jax.Array) -> jax.Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))
