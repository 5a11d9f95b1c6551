"""Losses: cross-entropy over a large vocabulary without its logits, and what methods ask of a training step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Chunks = tuple[jax.Array, jax.Array]


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, chunk: int = 1024
) -> jax.Array:
    """Cross-entropy of every token, a chunk of tokens at a time: whole logits never exist, nor does their gradient.

    The head's product is computed again in the backward pass. A chunk is a range of positions of all rows, so that rows dealt out over a
    mesh stay where they are. Whatever ``head`` closes over gets its gradient: trained heads, tied tables, adapters.

    Args:
      head: ``[rows, positions, width] -> [rows, positions, vocab]``, floating point.
      hidden: ``[rows, length, width]``. targets: int ``[rows, length]``.
      chunk: tokens at a time, rounded to whole positions of all rows; 0: all at once.

    Returns:
      float32 ``[rows, length]``; the softmax is in float32.

    Example:
      >>> head = lambda x: x @ jnp.zeros((4, 8))
      >>> losses = chunked_cross_entropy(head, jnp.ones((2, 3, 4)), jnp.zeros((2, 3), jnp.int32), chunk=2)
      >>> losses.shape, round(float(losses[0, 0]), 4)
      ((2, 3), 2.0794)
    """

    def one(part: Chunks) -> jax.Array:
        return token_losses(head(part[0]), part[1])

    return by_chunks(one, lambda parts: jax.lax.map(jax.checkpoint(one), parts), hidden, targets, chunk)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of ``logits [..., vocab]`` with int ``targets [...]``, in float32.

    Example:
      >>> round(float(token_losses(jnp.zeros(8), jnp.int32(3))), 4)
      2.0794
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def by_chunks(
    one: Callable[[Chunks], jax.Array],
    scan: Callable[[Chunks], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    chunk: int,
) -> jax.Array:
    """Cuts ``(hidden, targets)`` into chunks and puts the losses together again.

    Args:
      one: the losses of one chunk. scan: ``one`` over chunks along a new leading axis.

    Example:
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> by_chunks(lambda c: c[1], lambda c: c[1], x[..., None], x, 2).tolist()
      [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    rows, length = targets.shape
    width = max(1, chunk // rows) if chunk else length
    if width >= length:
        return one((hidden, targets))
    count = -(-length // width)
    width = -(-length // count)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * width - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    losses = scan((cut(hidden), cut(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(rows, -1)[:, :length]


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
