"""Directions for several objectives at once: weights of their gradients that let none of them rise, or lean towards a guide.

Everything is decided by inner products, so that gradients may be trees of any size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice
from lowrank_jax.pareto.simplex import check_count, contract, linear_program, min_norm_weights
from lowrank_jax.sites import flatten

Mode = Literal["descent", "guide", "min_norm"]


class ParetoDirection(NamedTuple):
    """Attributes: weights: ``[m]`` float32, a point of the simplex. direction: the weighted sum of the gradients, to be descended, in
    their dtypes. feasible: whether the program had a solution, a bool scalar; see `descent_weights` for what is done otherwise.
    """

    weights: jax.Array
    direction: Any
    feasible: jax.Array


def pareto_direction(gradients: Any, guide: Any = None, mode: Mode = "descent") -> ParetoDirection:
    """Pareto Domain Adaptation (ParetoDA, arXiv 2112.04137): one direction for several objectives, from their gradients.

    ``descent``: of all directions in the hull of the gradients along which no objective rises (to first order), the one with the largest
    sum of inner products with them; with a guide, also not against it where one objective is not. ``guide``: the one with the largest inner
    product with the guide, where an objective that the guide is against may rise, but no more than by following the guide itself.
    ``min_norm``: the shortest vector of the hull, Multiple-gradient descent algorithm (MGDA, Désidéri 2012), along which all fall equally
    fast where it lies inside.

    In ParetoDA the objectives are source classification, domain alignment and a surrogate of target classification on a shared backbone,
    and the guide is the gradient of the surrogate on held-out target data. The surrogate is minus a mutual information, so never above 0,
    and the released code guides only where it is above 0.001: in fact it always descends. It also adds the unweighted losses' gradients to
    the backbone's. Here the mode is the caller's to choose, and nothing is added. The release multiplies the weights by the number of
    objectives, 3, so that a step is as long as for their sum.

    Args:
      gradients: a tree of arrays ``[m, ...]``, such as ``jax.jacrev`` of stacked losses gives; m from 1 to 6, any floating dtype.
      guide: a tree of arrays ``[...]``; needed by ``guide``.

    Raises:
      ValueError: an unknown mode; no guide for ``guide``; leaves that differ in m, or from the guide's (by path); more than 6 objectives.

    Example:
      >>> gradients = {"w": jnp.array([[2.0, 0.0], [1.0, 1.0]])}
      >>> pareto_direction(gradients).weights.tolist()
      [1.0, 0.0]
      >>> pareto_direction(gradients, {"w": jnp.array([0.0, 1.0])}, "guide").direction["w"].tolist()
      [1.0, 1.0]
    """
    check_choice("pareto_direction", "mode", mode, get_args(Mode))
    if mode == "guide" and guide is None:
        raise ValueError("pareto_direction(mode='guide'): it needs guide=, the gradient to follow.")
    gram = gradient_gram(gradients)
    alignment = None if guide is None else _alignment(gradients, guide)
    if mode == "min_norm":
        weights, feasible = min_norm_weights(gram), jnp.asarray(True)
    elif mode == "guide":
        assert alignment is not None
        weights, feasible = guide_weights(gram, alignment)
    else:
        weights, feasible = descent_weights(gram, alignment)
    summed = lambda g: contract("m,m...->...", weights, g).astype(g.dtype)  # noqa: E731
    return ParetoDirection(weights, jax.tree.map(summed, gradients), feasible)


def gradient_gram(gradients: Any) -> jax.Array:
    """The inner products ``[m, m]`` of the gradients, over all leaves, float32.

    Raises:
      ValueError: no leaf, or leaves that differ in m (by path).

    Example:
      >>> gradient_gram({"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0], [0.0]])}).tolist()
      [[10.0, 2.0], [2.0, 4.0]]
    """
    return sum((contract("ia,ja->ij", x, x) for x in _rows(gradients)), jnp.zeros(()))


def descent_weights(gram: jax.Array, alignment: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Weights ``a`` of the simplex that maximise ``sum_j (C a)_j`` with ``C a >= 0`` and ``a . v >= min(max v, 0)``.

    Args:
      gram: C, ``[m, m]``, see `gradient_gram`. alignment: v, the gradients' inner products with a guide, ``[m]``; None: without the last
        constraint.

    Returns:
      The weights, and whether there are any. The last constraint may contradict the others; then it is left out, which the release's code
      can do but never does: it falls back on weights given by hand.

    Raises:
      ValueError: more than 6 objectives.

    Example:
      >>> weights, feasible = descent_weights(jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]))
      >>> weights.tolist(), bool(feasible)
      ([0.0, 0.0, 1.0], True)
    """
    total, none = gram.sum(0), jnp.zeros(gram.shape[0])
    relaxed, fine = linear_program(total, gram, none)
    # At a Pareto-stationary point the only solution may be the min-norm point, which rounding can exclude.
    relaxed = jnp.where(fine, relaxed, min_norm_weights(gram))
    if alignment is None:
        return relaxed, fine
    floor = jnp.minimum(alignment.max(), 0)
    weights, feasible = linear_program(total, jnp.vstack([gram, alignment]), jnp.append(none, floor))
    return jnp.where(feasible, weights, relaxed), feasible


def guide_weights(gram: jax.Array, alignment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights ``a`` of the simplex that maximise ``a . v``, where ``(C a)_j >= v_j`` for objectives that the guide is against.

    The objective that agrees most with the guide must not rise, ``(C a)_j >= 0``; others that agree with it are free. Where none agrees
    with it none may rise. There is always a solution, since the min-norm point is one.

    Args:
      gram: C, ``[m, m]``. alignment: v, ``[m]``.

    Returns:
      The weights, and whether a solution was found: False only by rounding, and then they are those of `min_norm_weights`.

    Raises:
      ValueError: more than 6 objectives.

    Example:
      >>> guide_weights(jnp.array([[4.0, 2.0], [2.0, 2.0]]), jnp.array([0.0, 1.0]))[0].tolist()
      [0.0, 1.0]
    """
    agrees = alignment > 0
    bounds = jnp.where(agrees, jnp.where(alignment == alignment.max(), 0, -jnp.inf), alignment)
    weights, feasible = linear_program(alignment, gram, jnp.where(agrees.any(), bounds, 0))
    return jnp.where(feasible, weights, min_norm_weights(gram)), feasible


def _rows(gradients: Any) -> list[jax.Array]:
    flat = {path: jnp.asarray(leaf) for path, leaf in flatten(gradients).items()}
    if not flat:
        raise ValueError("pareto: no gradients; expected a tree of arrays [m, ...].")
    m = next((leaf.shape[0] for leaf in flat.values() if leaf.ndim), 0)
    for path, leaf in flat.items():
        if leaf.ndim == 0 or leaf.shape[0] != m:
            raise ValueError(
                f"pareto: {path or 'the array'} of shape {list(leaf.shape)} does not start with the {m} objectives of the first leaf. "
                "Stack the gradients of all objectives, as jax.jacrev of stacked losses does."
            )
    check_count(m)
    return [leaf.reshape(m, -1) for leaf in flat.values()]


def _alignment(gradients: Any, guide: Any) -> jax.Array:
    if flatten(gradients).keys() != flatten(guide).keys():
        raise ValueError(
            "pareto_direction: guide is another tree than gradients; expected the same without the axis of objectives."
        )
    total = jnp.zeros(())
    for (path, g), v in zip(flatten(gradients).items(), flatten(guide).values(), strict=True):
        if jnp.shape(v) != g.shape[1:]:
            raise ValueError(
                f"pareto_direction: guide has {path or 'an array'} of shape {list(jnp.shape(v))}, expected {list(g.shape[1:])}."
            )
        total = total + contract("ia,a->i", g.reshape(g.shape[0], -1), jnp.ravel(v))
    return total
