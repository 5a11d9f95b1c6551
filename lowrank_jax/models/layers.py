"""What the models share: attention, rotary positions, masks, and the run over layers by a scan or by a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lowrank_jax.losses import Chunks, by_chunks, token_losses
from lowrank_jax.models.config_base import ModelConfig, remat_policy
from lowrank_jax.models.llama_config import RopeScaling

Implementation = Literal["xla", "cudnn"] | None

MASKED = -1e30
"""Added to a float32 logit that must not take part: finite, so that a row without any visible key stays free of NaN."""


def dense(config: Any, features: int, *, name: str, use_bias: bool = True) -> nn.Dense:
    """A linear layer with the types and the initial spread of the configuration.

    Example:
      >>> from lowrank_jax.models import LlamaConfig
      >>> dense(LlamaConfig.tiny(), 8, name="up").features
      8
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def embed(config: Any, rows: int, *, name: str) -> nn.Embed:
    """An embedding table of `rows` x hidden_size with the types and the initial spread of the configuration.

    Example:
      >>> from lowrank_jax.models import LlamaConfig
      >>> embed(LlamaConfig.tiny(), 8, name="embed_tokens").num_embeddings
      8
    """
    return nn.Embed(
        rows,
        config.hidden_size,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def run_layers(
    config: ModelConfig,
    layer: type[nn.Module],
    layer_kwargs: Mapping[str, Any],
    count: int,
    x: jax.Array,
    per_layer: Any = None,
    shared: tuple[Any, ...] = (),
) -> tuple[jax.Array, Any]:
    """Runs `count` layers, called inside a compact method, under the scan and remat settings of the configuration.

    Args:
      config: decides between a scan over stacked parameters (`layers/...`) and a loop (`layers_0/...`), and remat.
      layer: a module class whose call is `(x, per_layer, *shared) -> (x, output)`.
      layer_kwargs: the fields of the layer.
      count: the number of layers.
      x: the carried activations.
      per_layer: a pytree with a leading layer axis, sliced per layer, or None.
      shared: arguments that every layer gets whole.

    Returns:
      The activations after the last layer, and the layers' outputs stacked along a leading axis (None if they return None).

    Example: see `lowrank_jax.models.llama.Llama`.
    """
    if config.remat != "none":
        # Inside a scan the loop itself keeps XLA from merging the recomputation with the first computation.
        layer = nn.remat(layer, policy=remat_policy(config.remat), prevent_cse=not config.scan_layers)
    if config.scan_layers:
        scanned = nn.scan(
            layer,
            # What interceptors or capture_intermediates note per layer comes back stacked, as the parameters are.
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0,) + (nn.broadcast,) * len(shared),
            out_axes=0,
            length=count,
        )
        return scanned(**layer_kwargs, name="layers")(x, per_layer, *shared)
    outputs = []
    for i in range(count):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        x, output = layer(**layer_kwargs, name=f"layers_{i}")(x, own, *shared)
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def head_losses(head: nn.Module, hidden: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """`lowrank_jax.losses.chunked_cross_entropy` with a module for the head, lifted, so that interceptors see every chunk.

    Args:
      head: an nn.Dense, or the nn.Embed whose table is tied.
      hidden: (batch, length, width). targets: int (batch, length). chunk: tokens at a time; 0: all at once.

    Returns:
      float32 (batch, length).

    Example:
      >>> from lowrank_jax.models import LlamaConfig
      >>> table = embed(LlamaConfig.tiny(), 8, name="embed_tokens")
      >>> x, targets = jnp.zeros((1, 3, 64)), jnp.zeros((1, 3), jnp.int32)
      >>> losses, _ = table.init_with_output(jax.random.key(0), x, targets, 2, method=head_losses)
      >>> losses.shape, round(float(losses[0, 0]), 4)
      ((1, 3), 2.0794)
    """

    def one(head: Any, carry: None, part: Chunks) -> tuple[None, jax.Array]:
        logits = head.attend(part[0]) if isinstance(head, nn.Embed) else head(part[0])
        return carry, token_losses(logits, part[1])

    scan = nn.scan(
        nn.remat(one, prevent_cse=False),
        variable_broadcast="params",
        variable_axes={"intermediates": 0},
        split_rngs={"params": False, "dropout": True},
    )
    return by_chunks(
        lambda part: one(head, None, part)[1], lambda parts: scan(head, None, parts)[1], hidden, targets, chunk
    )


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    window: int | None = None,
    implementation: Implementation = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention with shared key/value heads, never repeated in memory.

    Args:
      query: (batch, queries, heads, head_dim).
      key, value: (batch, keys, kv_heads, head_dim), with heads a multiple of kv_heads.
      mask: bool, broadcastable to (batch, heads, queries, keys), True where a key is visible.
      is_causal: query i sees keys 0..i; for equal lengths only.
      window: with `is_causal`, sees only the last `window` of those keys.
      implementation: None, 'xla' or 'cudnn'.
      dropout: applied to the attention weights; takes the weights, returns them. Only for heads == kv_heads.

    Returns:
      (batch, queries, heads, head_dim), the type of `query`. Softmax is computed in float32.

    Raises:
      ValueError: dropout with shared key/value heads.

    Example:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attention(x, x, x, is_causal=True).shape
      (1, 3, 2, 4)
    """
    if dropout is None:
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=is_causal, local_window_size=local, implementation=implementation
        )
    if query.shape[2] != key.shape[2] or is_causal or window is not None:
        raise ValueError("attention dropout is for bidirectional attention with as many key/value heads as query heads")
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    weights = dropout(jax.nn.softmax(logits, axis=-1).astype(query.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of every pair of features of a head, in radians per position.

    RoFormer (arXiv 2104.09864); scaling as in `RopeScaling`.

    Args:
      width: the head's width, even.
      theta: the base.
      scaling: how to stretch, or None.

    Returns:
      float32 (width / 2,).

    Example:
      >>> rope_frequencies(4, 10000.0, None).tolist()
      [1.0, 0.009999999776482582]
    """
    freq = (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)).astype(np.float32)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / np.float32(scaling.factor)
    # llama3: long waves are stretched, short ones kept, those between are blended.
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * freq / scaling.factor + blend * freq).astype(np.float32)


def rope_table(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every rotation.

    Args:
      positions: int (batch, length).
      frequencies: float32 (width / 2,).

    Returns:
      Two float32 arrays (batch, length, 1, width / 2); the axis of 1 stands for the heads.

    Example:
      >>> cos, sin = rope_table(jnp.zeros((1, 2), jnp.int32), np.ones(3, np.float32))
      >>> cos.shape, float(cos[0, 0, 0, 0])
      ((1, 2, 1, 3), 1.0)
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (i, i + width / 2) of every head by the angles of `table`, in float32.

    Args:
      x: (batch, length, heads, width).
      table: from `rope_table`.

    Returns:
      The shape and type of `x`.

    Example:
      >>> table = rope_table(jnp.zeros((1, 1), jnp.int32), np.ones(1, np.float32))
      >>> rotate(jnp.ones((1, 1, 1, 2)), table).tolist()
      [[[[1.0, 1.0]]]]
    """
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
