"""Small programs over the simplex, solved exactly by trying every vertex or face, so that they are the same few operations under jit."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import linalg

MOST = 6  # objectives: with a constraint more than objectives 1,287 vertices, five times as many for each further one
_TOLERANCE = 1e-5  # of constraints whose largest coefficient is 1, in float32


def linear_program(objective: jax.Array, rows: jax.Array, bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ``a`` that maximises ``objective . a`` over the simplex with ``rows a >= bounds``; exact, by enumerating the vertices.

    A vertex is where ``m - 1`` of the ``m + k`` inequalities are equations; all are solved for, and the best that holds the others is
    taken. Rows and objective may be of any scale.

    Args:
      objective: ``[m]``. rows: ``[k, m]``. bounds: ``[k]``, where ``-inf`` is none.

    Returns:
      ``a [m]`` float32, and whether there is one: a bool scalar; without one, ``a`` means nothing. Constraints hold up to 1e-5 of their
      largest coefficient.

    Raises:
      ValueError: shapes that do not fit; more than 6 unknowns.

    Example:
      >>> a, feasible = linear_program(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0]]), jnp.array([0.25]))
      >>> a.tolist(), bool(feasible)
      ([0.25, 0.75], True)
    """
    m, k = objective.shape[0], rows.shape[0]
    check_count(m)
    if rows.shape != (k, m) or bounds.shape != (k,):
        raise ValueError(
            f"linear_program: objective [{m}], rows {list(rows.shape)}, bounds {list(bounds.shape)}; expected [m], [k, {m}], [k]."
        )
    return _best_vertex(objective, rows, bounds)


def min_norm_weights(gram: jax.Array) -> jax.Array:
    """Weights ``a [m]`` of the simplex that minimise ``a . C a``: of the shortest vector in the hull of the gradients, that of MGDA.

    Exact: for each set of objectives the stationary point of its face is solved for, and the shortest that lies in the simplex is taken.

    Args:
      gram: C, ``[m, m]``, see `gradient_gram`.

    Raises:
      ValueError: more than 6 objectives.

    Example:
      >>> min_norm_weights(jnp.array([[1.0, 0.0], [0.0, 3.0]])).tolist()
      [0.75, 0.25]
    """
    check_count(gram.shape[0])
    return _shortest(gram)


@jax.jit
def _best_vertex(objective: jax.Array, rows: jax.Array, bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
    k, m = rows.shape
    used = bounds > -jnp.inf
    scale = jnp.abs(rows).max(1, keepdims=True)
    scale = jnp.where(used[:, None] & (scale > 0), scale, 1)
    # An equation of zeros makes the system singular: where there is no bound there is no vertex.
    lines = jnp.vstack([jnp.eye(m), jnp.where(used[:, None], rows / scale, 0)])
    ends = jnp.append(jnp.zeros(m), jnp.where(used, bounds / scale[:, 0], -1))
    active = np.array(list(itertools.combinations(range(m + k), m - 1)), int).reshape(math.comb(m + k, m - 1), m - 1)
    systems = jnp.concatenate([jnp.ones((len(active), 1, m)), lines[active]], 1)
    sides = jnp.concatenate([jnp.ones((len(active), 1)), ends[active]], 1)
    points = _solve(systems, sides)
    holds = (contract("ci,vi->vc", lines, points) >= ends - _TOLERANCE).all(1) & jnp.isfinite(points).all(1)
    points = _on_simplex(points)
    gains = contract("i,vi->v", objective, points)
    return points[jnp.argmax(jnp.where(holds, gains, -jnp.inf))], holds.any()


@jax.jit
def _shortest(gram: jax.Array) -> jax.Array:
    m = gram.shape[0]
    inside = np.array(list(itertools.product([False, True], repeat=m)))[1:]
    # On a face (C a)_i is the same for all of its objectives, and a_i = 0 for the others; the last unknown is that value.
    stationary = jnp.concatenate([gram, -jnp.ones((m, 1))], 1)
    apart = jnp.eye(m, m + 1)
    rows = jnp.where(inside[:, :, None], stationary, apart)
    simplex = jnp.broadcast_to(jnp.append(jnp.ones(m), 0), (len(inside), 1, m + 1))
    sides = jnp.broadcast_to(jnp.append(jnp.zeros(m), 1), (len(inside), m + 1))
    points = _solve(jnp.concatenate([rows, simplex], 1), sides)[:, :m]
    # Those outside are moved in: what they become is no better than the best, which is among those inside.
    points = _on_simplex(points)
    return points[jnp.argmin(contract("vi,ij,vj->v", points, gram, points))]


def _solve(systems: jax.Array, sides: jax.Array) -> jax.Array:
    """The solutions of systems ``[v, n, n]``; not finite where singular."""
    return linalg.each(
        lambda both: jnp.linalg.solve(both[:, :-1], both[:, -1]), jnp.concatenate([systems, sides[..., None]], -1)
    )


def _on_simplex(points: jax.Array) -> jax.Array:
    # Of a singular system nothing is left; its place is taken by a point that is as good as any.
    points = jnp.maximum(jnp.where(jnp.isfinite(points).all(1, keepdims=True), points, 1), 0)
    return points / points.sum(1, keepdims=True)


def check_count(m: int) -> None:
    if m > MOST:
        raise ValueError(f"pareto: {m} objectives; all vertices are tried, so at most {MOST}. Sum some of them.")


def contract(equation: str, *operands: jax.Array) -> jax.Array:
    # At full precision: on some accelerators float32 products are rounded to fewer bits by default.
    wide = [x.astype(jnp.float32) for x in operands]
    return jnp.einsum(equation, *wide, precision=jax.lax.Precision.HIGHEST)
