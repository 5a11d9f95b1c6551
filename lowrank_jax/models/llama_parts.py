"""The Llama of `lowrank_jax.models.llama` taken apart, to be trained one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.models import layers
from lowrank_jax.models.llama import Layer
from lowrank_jax.models.llama_config import LlamaConfig
from lowrank_jax.optim.layerwise import ModelParts

Batch = Mapping[str, jax.Array]


def llama_parts(config: LlamaConfig) -> ModelParts:
    """Stem, layer and head of a Llama for `lowrank_jax.optim.layerwise_update`.

    A batch is ``{"tokens": int (batch, length)}`` and perhaps ``"loss_mask"`` of the same shape; every row is one text, padded at its end
    if at all (rows packed with several are not told apart). The loss is the mean over the tokens that the mask marks of the next-token
    cross-entropy in float32. ``config.remat`` is without effect: a layer keeps its input alone.

    Example:
      >>> from lowrank_jax.models import param_shapes
      >>> config = LlamaConfig.tiny(scan_layers=True)
      >>> parts, (stacked, rest) = llama_parts(config), split_layers(param_shapes(config))
      >>> batch = {"tokens": jax.ShapeDtypeStruct((2, 8), jnp.int32)}
      >>> x, shared = jax.eval_shape(parts.stem, rest, batch)
      >>> jax.eval_shape(parts.head, rest, x, shared, batch)
      ShapeDtypeStruct(shape=(), dtype=float32)
    """
    embedding = layers.embed(config, config.vocab_size, name="embed_tokens")
    frequencies = layers.rope_frequencies(config.width, config.rope_theta, config.rope_scaling)
    norm = nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=config.dtype, param_dtype=config.param_dtype)
    lm_head = layers.dense(config, config.vocab_size, name="lm_head", use_bias=False)

    def stem(rest: Any, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        positions = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
        x: Any = embedding.apply({"params": rest["embed_tokens"]}, batch["tokens"])
        return x, layers.rope_table(positions, frequencies)

    def layer(params: Any, x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
        return Layer(config).apply({"params": params}, x, None, table, None, 0)[0]

    def head(rest: Any, x: jax.Array, table: Any, batch: Batch) -> jax.Array:
        hidden: Any = norm.apply({"params": rest["norm"]}, x)
        module, own = (embedding, "embed_tokens") if config.tie_word_embeddings else (lm_head, "lm_head")
        tokens = batch["tokens"]
        losses: Any = module.apply(
            {"params": rest[own]}, hidden, jnp.roll(tokens, -1, axis=1), config.loss_chunk, method=layers.head_losses
        )
        learned = (
            batch["loss_mask"][:, 1:].astype(jnp.float32) if "loss_mask" in batch else jnp.ones(tokens[:, 1:].shape)
        )
        return jnp.sum(losses[:, :-1] * learned) / jnp.maximum(jnp.sum(learned), 1)

    return ModelParts(stem, layer, head)


def split_layers(params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The stacked layers, and the parameters outside them.

    Raises:
      ValueError: the layers are not stacked.

    Example:
      >>> split_layers({"layers": {"w": jnp.ones((2, 3))}, "norm": jnp.ones(3)})[0]["w"].shape
      (2, 3)
    """
    if "layers" not in params:
        raise ValueError(
            f"No stacked layers among {sorted(params)}: build the model with scan_layers=True, or use lowrank_jax.models.stack_layers."
        )
    return params["layers"], {name: value for name, value in params.items() if name != "layers"}


def join_layers(stacked: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `split_layers`.

    Example:
      >>> sorted(join_layers({"w": jnp.ones((2, 3))}, {"norm": jnp.ones(3)}))
      ['layers', 'norm']
    """
    return {**rest, "layers": stacked}
