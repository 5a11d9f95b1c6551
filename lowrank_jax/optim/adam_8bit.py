"""Adam whose moments are stored in eight bits a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.optim.blockwise import BLOCK, Quantised, dequantise_blockwise, quantise_blockwise


class ScaleByAdam8bitState(NamedTuple):
    """Attributes: count: updates made, int32. mu, nu: a `Quantised` for each large leaf, float32 for each small one."""

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, block: int = BLOCK, min_size: int = 4096
) -> optax.GradientTransformation:
    """Adam with block-wise dynamic eight-bit moments: two bytes and a few a number instead of eight.

    8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861). The moments are decoded, updated in float32 and encoded again in every
    step, without feedback of the error. Use it like ``optax.scale_by_adam``, as the inner transform of `galore` too. Blocks run across rows
    and layers, so on a mesh every device holds all of them.

    Args:
      b1, b2, eps: as in ``optax.scale_by_adam``. block: numbers that share a scale.
      min_size: leaves with fewer numbers keep float32 moments.

    Raises:
      ValueError: a decay outside [0, 1), a block of no numbers.

    Example:
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
      >>> state = scale_by_adam_8bit().init(params)
      >>> state.mu["w"].codes.dtype, state.mu["b"].dtype
      (dtype('uint8'), dtype('float32'))
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1) or block < 1:
        raise ValueError(
            f"scale_by_adam_8bit(b1={b1}, b2={b2}, block={block}): expected decays in [0, 1) and a block of at least 1."
        )

    def start(leaf: jax.Array, signed: bool) -> Any:
        zeros = jnp.zeros(leaf.shape, jnp.float32)
        return quantise_blockwise(zeros, signed, block) if leaf.size >= min_size else zeros

    def init(params: Any) -> ScaleByAdam8bitState:
        mu, nu = (jax.tree.map(lambda x, s=signed: start(x, s), params) for signed in (True, False))
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def moment(stored: Any, value: jax.Array, decay: float) -> jax.Array:
        old = dequantise_blockwise(stored) if isinstance(stored, Quantised) else stored
        return decay * old + (1 - decay) * value

    def one(g: jax.Array, mu: Any, nu: Any, count: jax.Array) -> tuple[jax.Array, Any, Any]:
        wide = g.astype(jnp.float32)
        m, v = moment(mu, wide, b1), moment(nu, wide**2, b2)
        step = (m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)).astype(g.dtype)
        if not isinstance(mu, Quantised):
            return step, m, v
        return step, quantise_blockwise(m, True, block), quantise_blockwise(v, False, block)

    def update(updates: Any, state: ScaleByAdam8bitState, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
        count = optax.safe_increment(state.count)
        treedef: Any
        leaves, treedef = jax.tree.flatten(updates)
        moments = zip(treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu), strict=True)
        done = [in_slices(one, g, mu, nu, count) for g, (mu, nu) in zip(leaves, moments, strict=True)]
        steps, mus, nus = zip(*done, strict=True) if done else ((), (), ())
        new = ScaleByAdam8bitState(count, treedef.unflatten(mus), treedef.unflatten(nus))
        return treedef.unflatten(steps), new

    return optax.GradientTransformation(init, update)


def in_slices(
    one: Callable[..., tuple[jax.Array, Any, Any]], g: jax.Array, mu: Any, nu: Any, count: jax.Array
) -> tuple[jax.Array, Any, Any]:
    """``one(g, mu, nu, count)``, for a stack of matrices one after another and in place: decoded moments of a whole stack never exist."""
    number = g.shape[0] if g.ndim > 2 else 1
    if number == 1 or not isinstance(mu, Quantised) or len(mu.codes) % number or g.size % mu.codes.size:
        return one(g, mu, nu, count)
    blocks = len(mu.codes) // number

    def cut(q: Quantised, n: jax.Array) -> Quantised:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, n * blocks, blocks)  # noqa: E731
        return Quantised(part(q.codes), part(q.largest), g.shape[1:], q.signed)

    def put(q: Quantised, new: Quantised, n: jax.Array) -> Quantised:
        laid = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, n * blocks, 0)  # noqa: E731
        return Quantised(laid(q.codes, new.codes), laid(q.largest, new.largest), q.shape, q.signed)

    def slice_(n: jax.Array, carry: Any) -> Any:
        g, mu, nu = carry
        step, m, v = one(jax.lax.dynamic_index_in_dim(g, n, keepdims=False), cut(mu, n), cut(nu, n), count)
        return jax.lax.dynamic_update_index_in_dim(g, step, n, 0), put(mu, m, n), put(nu, v, n)

    return jax.lax.fori_loop(0, number, slice_, (g, mu, nu))
