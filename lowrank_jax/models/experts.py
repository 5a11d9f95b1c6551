"""A sparse mixture of experts in the place of a feed-forward: every token goes through a few of many."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.models import layers
from lowrank_jax.models.llama_config import LlamaConfig
from lowrank_jax.shard import by_experts


class Experts(nn.Module):
    """The mixture of Mixtral of Experts (arXiv 2401.04088): a router picks the experts of a token and weighs what they make of it.

    An expert has a capacity, so many places for the tokens of each row of a batch: tokens move between devices only along the mesh axis
    'expert', whose devices have rows of their own elsewhere. A token that finds all places taken is dropped by that expert, as if it had
    made zero of it. With ``capacity_factor`` 0 there is a place for everyone, which is exact and costs as much as all experts together.
    There is no auxiliary loss for balance: it is for training the router, which adapters leave frozen.

    Attributes:
      config: shapes. expert: the module of one expert, ``(config) -> (rows, places, hidden) -> the same``.
    """

    config: LlamaConfig
    expert: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, hidden) to the same."""
        c = self.config
        rows, length, width = x.shape
        chosen, shares = self._route(x)
        places = capacity(c, length)
        at = _places(chosen, c.num_local_experts, places)  # (batch, length * chosen)
        senders = jnp.broadcast_to(jnp.repeat(jnp.arange(length), c.num_experts_per_tok), at.shape)
        empty = jnp.full((rows, c.num_local_experts * places), length)
        sent = jax.vmap(lambda slots, at, token: slots.at[at].set(token, mode="drop"))(empty, at, senders)
        given = _take(x, sent).reshape(rows, c.num_local_experts, places, width)
        every = nn.vmap(
            self.expert, in_axes=0, out_axes=0, axis_size=c.num_local_experts,
            variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True, "dropout": True},
        )  # fmt: skip
        made = by_experts(every(c, name="experts")(by_experts(jnp.swapaxes(given, 0, 1))))
        back = _take(jnp.swapaxes(made, 0, 1).reshape(rows, -1, width), at)
        return jnp.einsum("blkd,blk->bld", back.reshape(rows, length, -1, width), shares.astype(x.dtype))

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of every token, int (batch, length, chosen), and their shares, float32, which add up to one."""
        c = self.config
        scores = layers.dense(c, c.num_local_experts, name="router", use_bias=False)(x)
        best, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), c.num_experts_per_tok)
        return chosen, best / best.sum(-1, keepdims=True)


def capacity(config: LlamaConfig, length: int) -> int:
    """Places that an expert keeps for a row of so many tokens.

    Example:
      >>> config = LlamaConfig.tiny(architecture="mixtral", num_local_experts=8, capacity_factor=1.5)
      >>> capacity(config, 64), capacity(LlamaConfig.tiny(architecture="mixtral", num_local_experts=8), 64)
      (24, 64)
    """
    even = length * config.num_experts_per_tok / config.num_local_experts
    return min(length, math.ceil(even * config.capacity_factor)) if config.capacity_factor else length


def _places(chosen: jax.Array, experts: int, places: int) -> jax.Array:
    """Where each (token, expert) goes, int (batch, length * chosen): earlier tokens first, beyond the end if all places are taken."""
    chosen = chosen.reshape(chosen.shape[0], -1)
    taken = jax.nn.one_hot(chosen, experts, dtype=jnp.int32)
    before = jnp.take_along_axis(jnp.cumsum(taken, axis=1) - taken, chosen[..., None], axis=-1)[..., 0]
    return jnp.where(before < places, chosen * places + before, experts * places)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """``x[row, at[row]]`` (batch, n, width); zeros beyond the end."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x, at)
