"""Losses that methods ask of a training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def symmetric_kl(logits: jax.Array, others: jax.Array) -> jax.Array:
    """How far two outputs for the same batch disagree: ``(KL(p || q) + KL(q || p)) / 2``, the mean over all but the last axis.

    Of MoSA, Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training (arXiv 2312.02923), between two forward passes
    that drew different experts. In each term the one that is aimed at is a constant, as in the release, so either learns from the other.

    Args:
      logits, others: ``[..., classes]``, any floating dtype.

    Returns:
      A float32 scalar.

    Example:
      >>> float(symmetric_kl(jnp.zeros((2, 3)), jnp.ones((2, 3))))
      0.0
    """

    def towards(target: jax.Array, log_p: jax.Array) -> jax.Array:
        target = jax.lax.stop_gradient(target)
        return jnp.sum(jnp.exp(target) * (target - log_p), axis=-1)

    one, two = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (logits, others))
    return jnp.mean(towards(one, two) + towards(two, one)) / 2
