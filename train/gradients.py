"""The gradient of a batch, computed at once or in microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LossSum = Callable[[Any, Any, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array]]]


def of_mean(
    loss_sum: LossSum, trained: Any, batch: Any, rng: jax.Array, accumulate: int
) -> tuple[jax.Array, jax.Array, Any]:
    """``(total, weight, gradients)``, the gradients those of ``total / weight``.

    Args:
      loss_sum: ``(trained, batch, rng) -> (objective, (total, weight))``; the objective is the total, with penalties times the weight.
      accumulate: the number of microbatches; a divisor of the rows.

    Example:
      >>> loss = lambda w, x, rng: (jnp.sum(w * x), (jnp.sum(w * x), jnp.float32(x.size)))
      >>> total, weight, g = of_mean(loss, jnp.ones(()), jnp.arange(4.0), jax.random.key(0), 2)
      >>> float(total), float(weight), float(g)
      (6.0, 4.0, 1.5)
    """
    differentiate = jax.value_and_grad(loss_sum, has_aux=True)
    if accumulate == 1:
        (_, (total, weight)), gradients = differentiate(trained, batch, rng)
    else:
        # Row i goes to microbatch i % accumulate, so that rows dealt out over a mesh stay where they are.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)

        def one(sums: Any, part: Any) -> tuple[Any, None]:
            (_, (total, weight)), gradients = differentiate(trained, part[0], jax.random.fold_in(rng, part[1]))
            return jax.tree.map(jnp.add, sums, (total, weight, gradients)), None

        zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (total, weight, gradients), _ = jax.lax.scan(one, zeros, (parts, jnp.arange(accumulate)))
    # Losses are summed, then divided once: microbatches with few learned tokens weigh what they hold.
    return total, weight, jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0).astype(g.dtype), gradients)
