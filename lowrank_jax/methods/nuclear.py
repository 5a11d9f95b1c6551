"""The nuclear norm of sparse matrices as a penalty: of one matrix a step, with a subgradient that is finite everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.forms import Sparse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def nuclear_norm(shape: tuple[int, int], values: jax.Array, indices: jax.Array) -> jax.Array:
    """The sum of the singular values of the matrix with ``values [nnz]`` at the flat positions ``indices [nnz]``, zero elsewhere.

    Its gradient is ``U V^T`` over the non-zero singular values, at the entries: the subgradient of smallest norm. JAX's own derivative of
    an SVD is not finite where singular values coincide, and a sparse matrix has many zeros among them.

    Example:
      >>> norm = lambda values: nuclear_norm((2, 2), values, jnp.array([0, 3]))
      >>> float(norm(jnp.array([3.0, -3.0]))), jax.grad(norm)(jnp.array([3.0, -3.0])).tolist()
      (6.0, [1.0, -1.0])
    """
    return _norm_and_gradient(shape, values, indices)[0]


def of_one(
    norms: Sequence[Callable[[jax.Array | int], jax.Array]],
    sizes: Sequence[int],
    key: jax.Array | None,
    place: tuple[int, int] | None = None,
) -> jax.Array:
    """One of several numbers, drawn at random; nothing is computed of the others.

    Args:
      norms: functions of the number of a layer. sizes: how many layers each has; every layer is as likely.
      key: None: the mean of all, which is what a draw is on average.
      place: where these stand among more: the number of the first layer, and of all. What is drawn elsewhere is zero here.

    Example:
      >>> float(of_one([lambda layer: jnp.float32(layer), lambda layer: jnp.float32(10)], [2, 1], None))
      3.6666667461395264
    """
    first, total = place or (0, sum(sizes))
    if key is None:
        return (
            jnp.stack([norm(layer) for norm, size in zip(norms, sizes, strict=True) for layer in range(size)]).sum()
            / total
        )
    starts = first + np.cumsum([0, *sizes])
    drawn = jax.random.randint(key, (), 0, total)
    which = jnp.searchsorted(starts, drawn, side="right")  # 0 and the last: it stands elsewhere
    elsewhere = lambda layer: jnp.float32(0)  # noqa: E731
    return jax.lax.switch(which, [elsewhere, *norms, elsewhere], drawn - jnp.asarray(starts)[which - 1])


def _norm_and_gradient(shape: tuple[int, int], values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, sigma, vt = jnp.linalg.svd(Sparse(indices, values, shape).delta(values), full_matrices=False)
    in_use = sigma > sigma[0] * max(shape) * jnp.finfo(jnp.float32).eps
    return sigma.sum(), ((u * in_use) @ vt).reshape(-1)[indices]


def _backward(shape: tuple[int, int], at_entries: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return g * at_entries, None


nuclear_norm.defvjp(_norm_and_gradient, _backward)
