"""Subspaces that are some of a matrix's own coordinates, or some of several matrices: nothing to store but which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowrank_jax.batching import over_batch
from lowrank_jax.optim.projected import Space

Order = Literal["random", "ascending", "descending", "mirror"]
Find = Callable[[int, tuple[int, ...], jax.Array, jax.Array], jax.Array]
View = Callable[[jax.Array], jax.Array]


def some_inputs(density: float) -> Space:
    """``int(density * n_in)`` input features of each matrix, drawn anew each time."""
    return _rows(lambda n: int(density * n), _drawn, lambda g: g, lambda x, shape: x)


def some_outputs(density: float) -> Space:
    """``int(density * n_out)`` output features of each matrix, drawn anew each time."""
    swap = lambda g: jnp.swapaxes(g, -1, -2)  # noqa: E731
    return _rows(lambda n: int(density * n), _drawn, swap, lambda x, shape: swap(x))


def some_entries(density: float) -> Space:
    """``int(density * n_in * n_out)`` single entries of each matrix, drawn anew each time."""
    column = lambda g: g.reshape(*g.shape[:-2], -1, 1)  # noqa: E731
    return _rows(lambda n: int(density * n), _drawn, column, lambda x, shape: x.reshape(shape))


def some_matrices(density: float, order: Order) -> Space:
    """``round(density * matrices)`` of the matrices ``[matrices, n_in, n_out]``: drawn, or one after another.

    ``mirror`` takes them from both ends towards the middle.

    Raises:
      ValueError (from ``start``): an odd number of them for ``mirror``.
    """

    def find(k: int, shape: tuple[int, ...], key: jax.Array, number: jax.Array) -> jax.Array:
        m = shape[-1]
        if order == "random":
            return _drawn(k, shape, key, number)
        at = (number * k + jnp.arange(k)) % m
        if order == "descending":
            at = m - 1 - at
        if order == "mirror":
            at = jnp.where(at % 2 == 0, at // 2, m - 1 - at // 2)
        return at

    def count(n: int) -> int:
        k = round(density * n)
        if order == "mirror" and k % 2:
            raise ValueError(
                f"order='mirror', density={density}: {k} of the {n} matrices of a size would be updated; expected an even number. Choose "
                "another density or order."
            )
        return k

    line = lambda g: g.reshape(g.shape[0], -1)  # noqa: E731
    return _rows(count, find, line, lambda x, shape: x.reshape(-1, *shape[1:]))


def _drawn(k: int, shape: tuple[int, ...], key: jax.Array, number: jax.Array) -> jax.Array:
    return jnp.sort(jnp.argsort(jax.random.uniform(key, shape), -1)[..., :k], -1)


def _rows(
    count: Callable[[int], int], find: Find, view: View, back: Callable[[jax.Array, tuple[int, ...]], jax.Array]
) -> Space:
    """The space of ``count(n)`` rows of ``view(g) [*batch, n, m]``: their positions ``[*batch, k]`` int32."""

    def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        return jax.eval_shape(view, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[:-1]

    def start(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        *batch, n = rows_of(shape)
        return jnp.zeros((*batch, count(n)), jnp.int32)

    def found(g: jax.Array, key: jax.Array, number: jax.Array) -> jax.Array:
        rows = rows_of(g.shape)
        return find(count(rows[-1]), rows, key, number).astype(jnp.int32)

    def down(g: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.take_along_axis(view(g), where[..., None], -2)

    def up(x: jax.Array, where: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        empty = jax.eval_shape(view, jax.ShapeDtypeStruct(shape, x.dtype))
        return back(_put(jnp.zeros(empty.shape, x.dtype), where, x), shape)

    def left(g: jax.Array, where: jax.Array) -> jax.Array:
        return back(_put(view(g), where, jnp.zeros((), g.dtype)), g.shape)

    return Space(start, found, down, up, left)


def _put(rows: jax.Array, where: jax.Array, x: jax.Array) -> jax.Array:
    """``rows [*batch, n, m]`` with those at ``where [*batch, k]`` replaced."""
    put = over_batch(lambda rows, where, x: rows.at[where].set(x), where.ndim - 1, (0, 0, 0 if x.ndim else None))
    return put(rows, where, x)
