"""BERT, MiniLM and RoBERTa in Flax Linen: the encoder, and heads for classification and masked language modelling.

Every product with a weight is an `nn.Dense` or an `nn.Embed`, so that interceptors see it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.models import layers
from lowrank_jax.models.bert_config import BertConfig
from lowrank_jax.models.config_base import activation
from lowrank_jax.remat import nonlinear_input
from lowrank_jax.shard import by_rows


class EncoderOutput(NamedTuple):
    """What the 'encoder' task gives: `hidden` (batch, length, hidden), `pooled` (batch, hidden) or None without a pooler."""

    hidden: jax.Array
    pooled: jax.Array | None


class Embeddings(nn.Module):
    """Sum of token, position and type embeddings, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, token_types: jax.Array, positions: jax.Array) -> tuple[jax.Array, nn.Embed]:
        """Maps ids (batch, length) to (batch, length, hidden); returns the token table too, for a tied decoder."""
        c = self.config
        word = layers.embed(c, c.vocab_size, name="word_embeddings")
        x = word(tokens)
        x += layers.embed(c, c.max_position_embeddings, name="position_embeddings")(positions)
        x += layers.embed(c, c.type_vocab_size, name="token_type_embeddings")(token_types)
        return _norm(c, "norm")(x), word


class Attention(nn.Module):
    """Bidirectional self-attention."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps (batch, length, hidden) to the same; `mask` is bool (batch, 1, 1, length) or None."""
        c = self.config
        query, key, value = (
            nonlinear_input(layers.dense(c, c.hidden_size, name=name)(x)).reshape(
                *x.shape[:2], c.num_attention_heads, c.head_dim
            )
            for name in ("query", "key", "value")
        )
        drop = None
        if c.attention_probs_dropout_prob and not self.deterministic:
            drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=False)
        out = layers.attention(query, key, value, mask=mask, implementation=c.library_attention, dropout=drop).reshape(
            x.shape
        )
        return layers.dense(c, c.hidden_size, name="output")(out)


class Mlp(nn.Module):
    """Two dense layers with an activation between."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, hidden) to the same."""
        c = self.config
        x = activation(c.hidden_act)(nonlinear_input(layers.dense(c, c.intermediate_size, name="intermediate")(x)))
        return layers.dense(c, c.hidden_size, name="output")(x)


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: None, mask: jax.Array | None) -> tuple[jax.Array, None]:
        """Maps (batch, length, hidden) to the same."""
        c = self.config
        drop = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)
        x = nonlinear_input(by_rows(x))  # kept under any name; under this one it can be offloaded
        y = Attention(c, self.deterministic, name="attention")(x, mask)
        x = _norm(c, "attention_norm")(nonlinear_input(by_rows(x + drop(y))))
        return _norm(c, "mlp_norm")(nonlinear_input(by_rows(x + drop(Mlp(c, name="mlp")(x))))), None


class Encoder(nn.Module):
    """The stack of layers."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps (batch, length, hidden) to the same."""
        c = self.config
        fields = {"config": c, "deterministic": self.deterministic}
        return layers.run_layers(c, Layer, fields, c.num_hidden_layers, x, None, (mask,))[0]


class RobertaHead(nn.Module):
    """RoBERTa's classifier on the first token."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, hidden) to (batch, num_labels)."""
        c = self.config
        drop = _classifier_dropout(c, self.deterministic)
        x = jnp.tanh(layers.dense(c, c.hidden_size, name="dense")(drop(x)))
        return layers.dense(c, c.num_labels, name="out_proj")(drop(x))


class MlmHead(nn.Module):
    """Dense, activation and norm before the tied decoder, and the decoder's bias."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, word: nn.Embed) -> jax.Array:
        """Maps (batch, length, hidden) to (batch, length, vocab)."""
        c = self.config
        x = layers.dense(c, c.hidden_size, name="dense")(x)
        # RoBERTa's published head has the exact gelu whatever hidden_act says.
        x = activation("gelu" if c.architecture == "roberta" else c.hidden_act)(x)
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), c.param_dtype)
        return word.attend(_norm(c, "norm")(x)) + bias.astype(c.dtype)


class Bert(nn.Module):
    """A BERT or RoBERTa encoder with the head that `config.task` names.

    Attributes:
      config: shapes, head and how to run.

    Example:
      >>> model = Bert(BertConfig.tiny(task="classify", num_labels=3))
      >>> tokens = jnp.ones((2, 5), jnp.int32)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens).shape
      (2, 3)
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Runs the encoder and the head.

        Args:
          tokens: int (batch, length), length at most max_position_embeddings (less pad_token_id + 1 for RoBERTa).
          attention_mask: bool or int (batch, length); zero marks padding.
          token_types: int (batch, length), zero by default.
          positions: int (batch, length); by default those of the architecture.
          deterministic: False applies dropout and needs an rng named 'dropout'.

        Returns:
          task 'encoder': `EncoderOutput`; 'classify': logits (batch, num_labels); 'mlm': logits (batch, length, vocab).

        Raises:
          ValueError: tokens is not a matrix or is longer than the table of positions.
        """
        c = self.config
        offset = c.pad_token_id + 1 if c.architecture == "roberta" else 0
        longest = c.max_position_embeddings - offset
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            raise ValueError(
                f"tokens must have shape (batch, length) with length at most {longest}, got {tokens.shape}"
            )
        if positions is None:
            positions = _positions(c, tokens)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        visible = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        mask = None if attention_mask is None else visible[:, None, None, :]
        x, word = Embeddings(c, name="embeddings")(tokens, token_types, positions)
        x = nn.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(x)
        x = Encoder(c, deterministic, name="encoder")(x, mask)

        if c.task == "mlm":
            return MlmHead(c, name="mlm_head")(x, word)
        pooled = jnp.tanh(layers.dense(c, c.hidden_size, name="pooler")(x[:, 0])) if c.has_pooler else None
        if c.task == "encoder":
            return EncoderOutput(x, pooled)
        if c.classifier_pooling == "mean":
            pooled = mean_pool(x, visible)
        elif c.architecture == "roberta":
            return RobertaHead(c, deterministic, name="classifier")(x[:, 0])
        return layers.dense(c, c.num_labels, name="classifier")(_classifier_dropout(c, deterministic)(pooled))


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Average of the hidden states of the real tokens, summed in float32.

    Sentence-BERT (arXiv 1908.10084).

    Args:
      hidden: (batch, length, hidden).
      mask: bool or int (batch, length), non-zero at real tokens.

    Returns:
      (batch, hidden), the type of `hidden`; zero for a row without tokens.

    Example:
      >>> mean_pool(jnp.array([[[2.0], [4.0], [9.0]]]), jnp.array([[1, 1, 0]])).tolist()
      [[3.0]]
    """
    weight = mask.astype(jnp.float32)[..., None]
    total = (hidden.astype(jnp.float32) * weight).sum(axis=1)
    return (total / jnp.maximum(weight.sum(axis=1), 1.0)).astype(hidden.dtype)


def _positions(config: BertConfig, tokens: jax.Array) -> jax.Array:
    if config.architecture == "bert":
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = (tokens != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + config.pad_token_id


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels badly in float32 for means far from zero.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def _classifier_dropout(config: BertConfig, deterministic: bool) -> nn.Dropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate, deterministic=deterministic)
