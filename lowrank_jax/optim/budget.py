"""A budget shared out among scored candidates, exactly and under jit: what methods that move ranks during training have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def cubic_budget(step: Any, start: Any, stop: Any, first: int, last: int) -> jax.Array:
    """A budget that falls from ``first`` at ``start`` to ``last`` at ``stop`` as the cube of what is left of the way, int32.

    AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512).

    Args:
      step, start, stop: numbers, which may be traced. first, last: whole numbers.

    Example:
      >>> [int(cubic_budget(step, 100, 700, 144, 72)) for step in (0, 100, 400, 700, 1000)]
      [144, 144, 81, 72, 72]
    """
    left = 1 - (jnp.asarray(step) - start) / jnp.maximum(stop - start, 1)
    # The factor absorbs the rounding of float32, so that a whole number is not truncated to the one below.
    between = last + jnp.floor((first - last) * left**3 * (1 + 5e-7)).astype(jnp.int32)
    return jnp.where(step <= start, first, jnp.where(step >= stop, last, between))


def share_out(scores: jax.Array, limits: Any, budget: Any) -> jax.Array:
    """What each candidate gets: the best takes its limit, then the next, until the budget is spent. Of equal scores the first comes first.

    Args:
      scores: ``[n]``. limits: ``[n]`` whole numbers, the most each may take. budget: a whole number, which may be traced.

    Returns:
      ``[n]`` int32, whose sum is the budget, or the sum of the limits where that is less.

    Example:
      >>> share_out(jnp.array([1.0, 3.0, 3.0]), np.array([2, 2, 2]), 3).tolist()
      [0, 2, 1]
    """
    order = jnp.argsort(-scores, stable=True)
    wanted = jnp.asarray(limits, jnp.int32)[order]
    taken = jnp.clip(budget - (jnp.cumsum(wanted) - wanted), 0, wanted)
    return jnp.zeros_like(taken).at[order].set(taken)


def keep_best(scores: Mapping[str, jax.Array], costs: Mapping[str, int], budget: Any) -> dict[str, jax.Array]:
    """Which candidates are kept, over all weights together: the best ones that the budget pays for.

    Where every cost is 1 exactly ``budget`` are kept, however many scores are equal. Otherwise the budget is never exceeded and what
    is left of it is less than the next one's cost.

    Args:
      scores: ``{path: [...]}`` any shapes. costs: ``{path: cost}`` of each candidate of a weight. budget: may be traced.
        All costs together have to fit an int32: divide by their common divisor.

    Returns:
      ``{path: [...]}`` of bool.

    Example:
      >>> kept = keep_best({"x": jnp.ones(2), "y": jnp.array([0.0, 2.0])}, {"x": 1, "y": 1}, 2)
      >>> {path: k.tolist() for path, k in kept.items()}
      {'x': [True, False], 'y': [False, True]}
    """
    flat = jnp.concatenate([s.reshape(-1) for s in scores.values()])
    each = np.concatenate([np.full(s.size, costs[path]) for path, s in scores.items()])
    kept = share_out(flat, each, budget) == each
    parts = jnp.split(kept, np.cumsum([s.size for s in scores.values()])[:-1])
    return {path: part.reshape(s.shape) for part, (path, s) in zip(parts, scores.items(), strict=True)}
