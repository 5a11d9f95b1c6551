"""Dropout, as every form does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drop(x: jax.Array, probability: float, rng: jax.Array | None) -> jax.Array:
    """Each element zero with this probability, the others scaled up; unchanged outside training, where ``rng`` is None."""
    if not probability or rng is None:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - probability, x.shape), x / (1 - probability), 0).astype(x.dtype)
