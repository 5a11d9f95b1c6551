"""Nested ranks as an optax transform: only the directions that took part in a step are updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_used(axes: Mapping[str, int]) -> optax.GradientTransformationExtraArgs:
    """Zeroes the updates of directions that got no gradient at any site in this step.

    DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation (arXiv 2210.07558) trains a
    part of its directions in each step. A gradient of zero is not enough to leave the others alone: momentum and weight decay go on
    moving them. Chain it after the optimizer. Which directions took part is read from the gradients, so it holds for accumulated ones.

    Args:
      axes: ``{leaf: axis}``, where the directions of each leaf are; every leaf has equally many of them. Other leaves pass.

    Returns:
      A stateless optax transform on ``{path: {leaf: update}}``; ``update`` takes the loss's ``gradients`` by name.

    Example:
      >>> tx = update_used({"b": -2})
      >>> ones, gradient = {"x": {"b": jnp.ones((2, 1))}}, {"x": {"b": jnp.array([[0.0], [3.0]])}}
      >>> tx.update(ones, tx.init(ones), gradients=gradient)[0]["x"]["b"].tolist()
      [[0.0], [1.0]]
    """

    def update(
        updates: Mapping[str, Any], state: Any, params: Any = None, *, gradients: Any, **extra: Any
    ) -> tuple[Any, Any]:
        each = [_used(leaves[name], axis) for leaves in gradients.values() for name, axis in axes.items()]
        used = jnp.stack(each).any(0)

        def masked(name: str, u: jax.Array) -> jax.Array:
            if name not in axes:
                return u
            return jnp.where(used.reshape(-1, *[1] * (-1 - axes[name])), u, jnp.zeros_like(u))

        return {path: {name: masked(name, u) for name, u in leaves.items()} for path, leaves in updates.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _used(gradient: jax.Array, axis: int) -> jax.Array:
    others = tuple(n for n in range(gradient.ndim) if n != gradient.ndim + axis)
    return (gradient != 0).any(others)
