"""Importance smoothed over steps: the mean of a sensitivity times how much it varies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Importance(NamedTuple):
    """Running averages, both trees of float32 arrays.

    Attributes:
      mean: of the sensitivity. spread: of its distance from ``mean``.
    """

    mean: Any
    spread: Any


def zero_importance(like: Any) -> Importance:
    """Where the averages start, for sensitivities of these shapes."""
    # Arrays of their own, so that a step may donate them.
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)  # noqa: E731
    return Importance(zeros(), zeros())


def smooth(old: Importance, sensitivity: Any, betas: tuple[float, float]) -> Importance:
    """The averages one step on: the spread is taken from the new mean, as AdaLoRA (arXiv 2303.10512) has it.

    Example:
      >>> new = smooth(zero_importance(jnp.zeros(1)), jnp.ones(1), (0.5, 0.5))
      >>> new.mean.tolist(), new.spread.tolist(), score(new).tolist()
      ([0.5], [0.25], [0.125])
    """
    mean = jax.tree.map(lambda m, s: betas[0] * m + (1 - betas[0]) * s, old.mean, sensitivity)
    spread = jax.tree.map(lambda u, s, m: betas[1] * u + (1 - betas[1]) * jnp.abs(s - m), old.spread, sensitivity, mean)
    return Importance(mean, spread)


def score(importance: Importance) -> Any:
    """Mean times spread, elementwise."""
    return jax.tree.map(jnp.multiply, importance.mean, importance.spread)
