"""The Llama family in Flax Linen: one module for Llama 2 and 3, Mistral, Mixtral, SmolLM2, Qwen2 and Qwen3.

Every product with a weight is an `nn.Dense` or an `nn.Embed`, so that interceptors see it. The key/value cache is an argument and
a result, not a variable: the model stays a pure function of its parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.models import layers
from lowrank_jax.models.config_base import activation
from lowrank_jax.models.experts import Experts
from lowrank_jax.models.llama_config import LlamaConfig
from lowrank_jax.models.splash import splash_attention
from lowrank_jax.remat import nonlinear_input
from lowrank_jax.shard import by_rows

Cache = dict[str, Any]
"""'key', 'value': (layers, batch, slots, kv_heads, head_dim); 'valid', 'positions': (batch, slots); 'index': slots in use."""


def init_cache(config: LlamaConfig, batch: int, slots: int) -> Cache:
    """An empty key/value cache.

    Args:
      config: gives layers, heads, width and the type.
      batch: rows.
      slots: the longest sequence, prompt and padding included. Writing beyond it is not detected.

    Returns:
      A pytree of arrays to pass to `Llama.__call__`, which returns the next one.

    Example:
      >>> init_cache(LlamaConfig.tiny(), batch=1, slots=8)["key"].shape
      (2, 1, 8, 2, 16)
    """
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.width)
    return {
        "key": jnp.zeros(shape, config.dtype),
        "value": jnp.zeros(shape, config.dtype),
        "valid": jnp.zeros((batch, slots), bool),
        "positions": jnp.zeros((batch, slots), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        slots: Any,
        table: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        index: jax.Array | int,
    ) -> tuple[jax.Array, Any]:
        """Maps (batch, length, hidden) to the same; `slots` is this layer's key/value pair of the cache, or None."""
        c = self.config
        heads = (
            ("q_proj", c.num_attention_heads),
            ("k_proj", c.num_key_value_heads),
            ("v_proj", c.num_key_value_heads),
        )
        query, key, value = (
            nonlinear_input(layers.dense(c, n * c.width, name=name, use_bias=c.qkv_bias)(x)).reshape(
                *x.shape[:2], n, c.width
            )
            for name, n in heads
        )
        if c.qk_norm:
            query, key = _norm(c, "q_norm")(query), _norm(c, "k_norm")(key)
        query, key = layers.rotate(query, table), layers.rotate(key, table)
        if slots is not None:
            key = jax.lax.dynamic_update_slice_in_dim(slots[0], key, index, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(slots[1], value, index, axis=1)
            slots = (key, value)
        # Without a cache or positions of its own the order of the array is all there is to know: no mask is ever built.
        plain = slots is None and (mask is None or mask.shape[-2] == 1)
        if c.attention_implementation == "splash" and slots is None:
            out = splash_attention(query, key, value, mask, c.sliding_window)
        else:
            out = layers.attention(
                query,
                key,
                value,
                mask=mask,
                is_causal=plain,
                window=c.sliding_window if plain else None,
                implementation=c.library_attention,
            )
        out = out.reshape(*x.shape[:2], c.num_attention_heads * c.width)
        return layers.dense(c, c.hidden_size, name="o_proj", use_bias=c.out_bias)(out), slots


class Mlp(nn.Module):
    """Gated feed-forward, GLU Variants Improve Transformer (arXiv 2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, hidden) to the same."""
        c = self.config
        gate, up = (
            nonlinear_input(layers.dense(c, c.intermediate_size, name=name, use_bias=c.mlp_bias)(x))
            for name in ("gate_proj", "up_proj")
        )
        return layers.dense(c, c.hidden_size, name="down_proj", use_bias=c.mlp_bias)(
            activation(c.hidden_act)(gate) * up
        )


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, slots: Any, *shared: Any) -> tuple[jax.Array, Any]:
        """Maps (batch, length, hidden) to the same; returns this layer's part of the cache as well."""
        c = self.config
        x = nonlinear_input(by_rows(x))  # kept under any name; under this one it can be offloaded
        y, slots = Attention(c, name="attention")(_norm(c, "input_norm")(x), slots, *shared)
        x = nonlinear_input(by_rows(x + y))
        mlp = Experts(c, Mlp, name="moe") if c.num_local_experts else Mlp(c, name="mlp")
        return by_rows(x + mlp(_norm(c, "post_attention_norm")(x))), slots


class Llama(nn.Module):
    """A decoder-only language model.

    Attributes:
      config: shapes and how to run.

    Example:
      >>> model = Llama(LlamaConfig.tiny())
      >>> tokens = jnp.ones((1, 5), jnp.int32)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens).shape
      (1, 5, 97)
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        logits_at: jax.Array | None = None,
        return_hidden: bool = False,
        targets: jax.Array | None = None,
    ) -> Any:
        """Next-token logits, or their cross-entropy with given targets.

        Args:
          tokens: int (batch, length).
          attention_mask: bool or int (batch, length); zero marks padding, at any side.
          positions: int (batch, length) for the rotary embedding and the sliding window; by default the order in the array,
            counted on from the cache.
          segment_ids: int (batch, length) of packed sequences; a token sees its own segment only. Not with a cache.
          cache: from `init_cache` or an earlier call; `tokens` are appended to it.
          logits_at: int (batch,): the only place of each row whose logits are wanted.
          return_hidden: gives the normalised hidden states (batch, length, hidden) in place of logits.
          targets: int (batch, length): gives the cross-entropy of every token in place of logits, float32 (batch, length), computed
            `config.loss_chunk` tokens at a time. Not with a cache, logits_at or return_hidden.

        Returns:
          Logits (batch, length, vocab) of the compute type, or (batch, vocab) with `logits_at`; with a cache, the pair of them
          and the new cache.

        Raises:
          ValueError: tokens is not a matrix, segment_ids come with a cache, or targets with what they exclude, or positions with splash
            attention in a sliding window.
        """
        c = self.config
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (batch, length), got {tokens.shape}")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids cannot be used with a cache: pack sequences for training only")
        if targets is not None and (cache is not None or logits_at is not None or return_hidden):
            raise ValueError("targets ask for losses: leave out cache, logits_at and return_hidden")
        start: jax.Array | int = 0 if cache is None else cache["index"]
        # A window over positions that the caller chose cannot be told from the order in the array.
        ordered = positions is None or c.sliding_window is None
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        valid = None if attention_mask is None else attention_mask.astype(bool)
        mask: jax.Array | None
        if cache is not None:
            cache = _extend(cache, positions, valid)
            mask = _mask(c, start, positions, cache["positions"], cache["valid"], None)
        elif c.attention_implementation == "splash":
            mask = _segments(ordered, valid, segment_ids)
        elif segment_ids is None and ordered:
            mask = None if valid is None else valid[:, None, None, :]
        else:
            mask = _mask(c, 0, positions, positions, valid, segment_ids)

        table = layers.rope_table(positions, layers.rope_frequencies(c.width, c.rope_theta, c.rope_scaling))
        embedding = layers.embed(c, c.vocab_size, name="embed_tokens")
        slots = None if cache is None else (cache["key"], cache["value"])
        x, slots = layers.run_layers(
            c, Layer, {"config": c}, c.num_hidden_layers, embedding(tokens), slots, (table, mask, start)
        )
        x = _norm(c, "norm")(x)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)[:, 0]
        head = embedding if c.tie_word_embeddings else layers.dense(c, c.vocab_size, name="lm_head", use_bias=False)
        if targets is not None:
            return layers.head_losses(head, x, targets, c.loss_chunk)
        out = x if return_hidden else (embedding.attend if c.tie_word_embeddings else head)(x)
        if cache is None:
            return out
        return out, cache | {"key": slots[0], "value": slots[1], "index": start + tokens.shape[1]}


def _segments(ordered: bool, valid: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array | None:
    """Int (batch, length) or None: what splash attention takes for a mask; padding is a segment of its own."""
    if not ordered:
        raise ValueError("splash attention counts a sliding window by the order in the array: leave out positions")
    if valid is None:
        return None if segment_ids is None else segment_ids.astype(jnp.int32)
    return jnp.where(valid, 0 if segment_ids is None else segment_ids, -1).astype(jnp.int32)


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _extend(cache: Cache, positions: jax.Array, valid: jax.Array | None) -> Cache:
    """Notes the new tokens in the cache's book-keeping; the layers write keys and values."""
    if valid is None:
        valid = jnp.ones(positions.shape, bool)
    update = jax.lax.dynamic_update_slice_in_dim
    return cache | {
        "valid": update(cache["valid"], valid, cache["index"], axis=1),
        "positions": update(cache["positions"], positions.astype(jnp.int32), cache["index"], axis=1),
    }


def _mask(
    config: LlamaConfig,
    start: jax.Array | int,
    query_positions: jax.Array,
    key_positions: jax.Array,
    key_valid: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Bool (batch, 1, queries, keys): keys that came before, are real, of the same segment and within the window."""
    order = start + jnp.arange(query_positions.shape[1])[:, None] >= jnp.arange(key_positions.shape[1])[None, :]
    mask = order[None]
    if key_valid is not None:
        mask = mask & key_valid[:, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if config.sliding_window is not None:
        mask = mask & (query_positions[:, :, None] - key_positions[:, None, :] < config.sliding_window)
    return mask[:, None]
