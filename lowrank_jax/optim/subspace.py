"""Subspaces of matrices for optimizers: which side, a basis from a gradient, there and back. Batched over leading axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.optim.projected import Space

Side = Literal["smaller", "larger", "input", "output", "both"]


class Bases(NamedTuple):
    """Orthonormal columns: ``inputs [*batch, n_in, r]``, ``outputs [*batch, n_out, r]``; None: that side is whole."""

    inputs: jax.Array | None = None
    outputs: jax.Array | None = None


def sides(side: Side, n_in: int, n_out: int) -> tuple[bool, bool]:
    """Whether the input side and the output side of a matrix ``[n_in, n_out]`` are projected.

    ``smaller``: the shorter of the two, the input of a square one, as GaLore's paper and code do. ``larger``: the longer, as
    `optax.contrib.galore` does: less state, another algorithm.

    Example:
      >>> sides("smaller", 4, 8), sides("larger", 4, 8), sides("both", 4, 8)
      ((True, False), (False, True), (True, True))
    """
    if side == "both":
        return True, True
    inputs = {"input": True, "output": False, "smaller": n_in <= n_out, "larger": n_in >= n_out}[side]
    return inputs, not inputs


def projected_size(side: Side, n_in: int, n_out: int) -> int:
    """The dimension that a rank has to fit into.

    Example:
      >>> projected_size("smaller", 4, 8), projected_size("larger", 4, 8)
      (4, 8)
    """
    return min(n for n, chosen in zip((n_in, n_out), sides(side, n_in, n_out), strict=True) if chosen)


# A gradient's subspace is used for some hundred steps and then sought anew: fewer iterations than a start from a weight takes.
REFRESH_ITERATIONS = 2


def singular_directions(
    rank: int, side: Side, method: linalg.SvdMethod = "randomized", power_iterations: int = REFRESH_ITERATIONS
) -> Space:
    """The space of GaLore: the gradient's leading singular directions."""
    return bases_space(rank, side, lambda g, key: leading(g, rank, side, key, method, power_iterations))


def bases_space(rank: int, side: Side, find: Callable[[jax.Array, jax.Array], Bases]) -> Space:
    """A space of orthonormal `Bases` of ``rank`` columns, which ``(g, key) ->`` finds."""

    def start(shape: tuple[int, ...], dtype: Any) -> Bases:
        used = zip(shape[-2:], sides(side, *shape[-2:]), strict=True)
        return Bases(*(jnp.zeros((*shape[:-2], n, rank), dtype) if chosen else None for n, chosen in used))

    def turned(r: jax.Array, old: Bases, new: Bases, squares: bool) -> jax.Array:
        between = turn(old, new)
        return project_back(r, jax.tree.map(jnp.square, between) if squares else between)

    return Space(
        start,
        lambda g, key, number: find(g, key),
        project,
        lambda r, bases, shape: project_back(r, bases),
        lambda g, bases: g - project_back(project(g, bases), bases),
        turned,
        Bases("in", "out"),  # type: ignore[arg-type]
    )


def leading(
    g: jax.Array,
    rank: int,
    side: Side,
    key: jax.Array,
    method: linalg.SvdMethod = "randomized",
    power_iterations: int = REFRESH_ITERATIONS,
) -> Bases:
    """The leading singular directions of ``g [*batch, n_in, n_out]`` on the chosen side, decomposed in float32.

    Strongest first, the entry of largest magnitude in each column positive: a moment kept over a refresh keeps its sign where directions
    hardly moved.

    Args:
      rank: at most the smaller dimension. key, power_iterations: of ``randomized``.

    Example:
      >>> g = jnp.diag(jnp.array([1.0, 3.0]))
      >>> leading(g, 1, "input", jax.random.key(0)).inputs.round(2).tolist()
      [[0.0], [1.0]]
    """
    inputs, outputs = sides(side, *g.shape[-2:])
    if method == "randomized":
        flipped = jnp.swapaxes(g, -1, -2)
        found = linalg.directions(key, g if inputs else flipped, rank, power_iterations)
        if inputs and outputs:
            return Bases(found, linalg.left_singular_vectors(jnp.matmul(flipped, found, precision="highest"), rank))
        return Bases(found, None) if inputs else Bases(None, found)
    u, _, vt = linalg.svd(g, rank, method=method)
    v = jnp.swapaxes(vt, -1, -2)
    return Bases(u if inputs else None, v * linalg.signs(v) if outputs else None)


def project(g: jax.Array, bases: Bases) -> jax.Array:
    """``P^T g``, ``g Q`` or ``P^T g Q``, in the dtype of ``g``, accumulated in float32.

    Example:
      >>> project(jnp.ones((4, 6)), Bases(jnp.eye(4, 2))).shape
      (2, 6)
    """
    if bases.inputs is not None:
        g = _product(jnp.swapaxes(bases.inputs, -1, -2), g)
    return g if bases.outputs is None else _product(g, bases.outputs)


def project_back(r: jax.Array, bases: Bases) -> jax.Array:
    """``P r``, ``r Q^T`` or ``P r Q^T``: the inverse of `project` on the subspace.

    Example:
      >>> bases = Bases(jnp.eye(4, 2))
      >>> project_back(project(jnp.ones((4, 6)), bases), bases).sum()
      Array(12., dtype=float32)
    """
    if bases.inputs is not None:
        r = _product(bases.inputs, r)
    return r if bases.outputs is None else _product(r, jnp.swapaxes(bases.outputs, -1, -2))


def turn(old: Bases, new: Bases) -> Bases:
    """What takes coordinates in one subspace to coordinates in another: ``project_back(r, turn(old, new))`` is ``r`` seen from the new.

    Example:
      >>> turn(Bases(jnp.eye(2, 1)), Bases(jnp.array([[0.6], [0.8]]))).inputs.tolist()
      [[0.6000000238418579]]
    """
    between = lambda x, y: None if x is None else _product(jnp.swapaxes(y, -1, -2), x)  # noqa: E731
    return Bases(between(old.inputs, new.inputs), between(old.outputs, new.outputs))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = jnp.result_type(x, y)
    return jnp.matmul(x, y, preferred_element_type=jnp.promote_types(dtype, jnp.float32)).astype(dtype)
