"""The product every low-rank form is made of, ``scale * x @ a @ mid @ b``, with a fast backward pass.

The gradient of a factor contracts over every token, ``dw = x^T g``, with one operand as wide as the model
and the other as narrow as the rank. JAX's own rule always puts the incoming gradient on the left, and XLA
copies the left operand of a contraction over several axes into transposed order: for ``b`` that is the wide
one, and the doubly transposed product left behind is one that XLA:CPU has no fast kernel for. Here the narrow
operand is on the left, so whatever is copied is small. The token axes are never merged, so a sharded batch or
sequence axis stays where it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike

from lowrank_jax.remat import narrow


class _Static(NamedTuple):
    """What the backward pass must know of an operand even when the operand itself is not kept."""

    x_dtype: DTypeLike
    w_dtype: DTypeLike
    out_dtype: DTypeLike
    precision: Any


def low_rank_matmul(
    x: jax.Array,
    a: jax.Array,
    mid: jax.Array | None,
    b: jax.Array,
    scale: float | jax.Array,
    *,
    precision: Any = None,
) -> jax.Array:
    """The update that low-rank factors add to a linear layer's output: ``scale * x @ a @ mid @ b``.

    The products multiply in the dtype of ``x`` and accumulate in float32, whatever the factors are stored in,
    so float32 factors on a bfloat16 model never make a float32 copy of the input. Gradients come back in each
    factor's own dtype. ``x`` is kept for the backward pass only if ``a`` is differentiated: with ``a`` and
    ``b`` frozen (LaMDA, LoRA-XS) only rank-wide activations are. Reverse mode only, as anything with a custom
    VJP.

    Args:
      x: ``[..., n_in]``, floating point.
      a: ``[n_in, r]``.
      mid: None, a vector ``[r]`` (a diagonal) or a matrix ``[r, r]`` between the factors.
      b: ``[r, n_out]``.
      scale: a number or a scalar array.
      precision: as in ``jax.lax.dot_general``.

    Returns:
      ``[..., n_out]`` in the dtype of ``x``.

    Raises:
      ValueError: where the shapes do not chain.

    Example:
      >>> x, a, b = jnp.ones((2, 4)), jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> low_rank_matmul(x, a, None, b, 0.5)[0]
      Array([2., 2., 2.], dtype=float32)
    """
    _check_shapes(x, a, mid, b)
    # Rank-wide values stay as accumulated; only the wide output is rounded to the model's dtype.
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    u = dot(x, a, accumulator, precision)
    if mid is not None:
        u = narrow(u if mid.ndim == 1 else u.astype(x.dtype))
        u = u * mid.astype(u.dtype) if mid.ndim == 1 else dot(u, mid, accumulator, precision)
    # The scale meets the rank-wide activation: on the output it would cost a pass over the widest array.
    u = narrow((u * scale).astype(x.dtype))
    return dot(u, b, x.dtype, precision)


def _check_shapes(x: jax.Array, a: jax.Array, mid: jax.Array | None, b: jax.Array) -> None:
    chained = a.ndim == b.ndim == 2 and x.ndim >= 1 and x.shape[-1] == a.shape[0] and a.shape[1] == b.shape[0]
    if not chained or (mid is not None and mid.shape not in (b.shape[:1], (a.shape[1], b.shape[0]))):
        middle = None if mid is None else mid.shape
        raise ValueError(
            f"x {x.shape}, a {a.shape}, mid {middle} and b {b.shape} do not chain: expected x [..., n_in], "
            "a [n_in, r], mid None, [r] or [r, r], and b [r, n_out]. Map over batch axes with jax.vmap."
        )


def dot(x: jax.Array, w: jax.Array, out_dtype: DTypeLike, precision: Any = None) -> jax.Array:
    """``x [..., k] @ w [k, n]``, multiplied in the dtype of ``x``, with the backward pass described above."""
    return _dot_vjp(_Static(x.dtype, w.dtype, out_dtype, precision), x, w)


def _contract(
    static: _Static, lhs: jax.Array, rhs: jax.Array, axes: tuple[Any, Any], out_dtype: DTypeLike
) -> jax.Array:
    return lax.dot_general(
        lhs.astype(static.x_dtype),
        rhs.astype(static.x_dtype),
        (axes, ((), ())),
        precision=static.precision,
        preferred_element_type=out_dtype,
    )


def _forward(static: _Static, x: jax.Array, w: jax.Array) -> jax.Array:
    return _contract(static, x, w, ((x.ndim - 1,), (0,)), static.out_dtype)


def _forward_keeping_needed(
    static: _Static, x: CustomVJPPrimal, w: CustomVJPPrimal
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    return _forward(static, x.value, w.value), kept


def _backward(
    static: _Static, kept: tuple[jax.Array | None, jax.Array | None], g: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, jax.Array | None]:
    if isinstance(g, SymbolicZero):
        return None, None
    x, w = kept
    dx = None if w is None else _contract(static, g, w, ((g.ndim - 1,), (1,)), static.x_dtype)
    dw = None if x is None else _weight_gradient(static, x, g).astype(static.w_dtype)
    return dx, dw


def _weight_gradient(static: _Static, x: jax.Array, g: jax.Array) -> jax.Array:
    """``x^T g`` over every leading axis, the narrower of the two on the left."""
    axes = (tuple(range(x.ndim - 1)),) * 2
    accumulator = jnp.promote_types(static.x_dtype, jnp.float32)
    if x.shape[-1] <= g.shape[-1]:
        return _contract(static, x, g, axes, accumulator)
    # Without the barrier XLA folds the transpose of this small result back into the product, operands swapped.
    return lax.optimization_barrier(_contract(static, g, x, axes, accumulator)).T


_dot_vjp = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_dot_vjp.defvjp(_forward_keeping_needed, _backward, symbolic_zeros=True)
