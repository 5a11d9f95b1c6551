"""Bottleneck: a small network beside a weight (parallel) or behind it (sequential)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.batching import over_batch
from lowrank_jax.forms._dropout import drop
from lowrank_jax.forms._matmul import dot
from lowrank_jax.forms.base import Call, Record, UnsupportedError
from lowrank_jax.remat import narrow

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@struct.dataclass
class Bottleneck:
    """Factors of a linear adapter ``scale * ((source @ down + down_bias) @ up + up_bias)`` added to a weight's output.

    Attributes:
      down: ``[*batch, n_source, r]``; up: ``[*batch, r, n_out]``; down_bias: ``[*batch, r]`` or None; up_bias: ``[*batch, n_out]`` or None.
      scale: multiplies the whole.
      dropout: probability with which an element between the two products is dropped during training.
      position: the source: ``parallel``: the weight's input; ``sequential``: its output, bias included.

    Example:
      >>> import jax.numpy as jnp
      >>> form = Bottleneck(jnp.ones((3, 1)), jnp.ones((1, 3)), position="sequential")
      >>> form.delta(jnp.eye(3))[0]
      Array([1., 1., 1.], dtype=float32)
    """

    down: jax.Array
    up: jax.Array
    down_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    position: Literal["parallel", "sequential"] = struct.field(pytree_node=False, default="parallel")

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv"}))

    def apply(self, call: Call) -> jax.Array:
        return call.y + self.update(call)

    def update(self, call: Call) -> jax.Array:
        """What `apply` adds to the output."""
        dtype = call.y.dtype
        up, up_bias = self._output_side(call)
        hidden = drop(self._between(self._hidden(call)), self.dropout, call.rng)
        # The scale meets the narrow activation: on the output it would cost a pass over the widest array.
        out = product((hidden * self.scale).astype(dtype), up, dtype)
        return out if up_bias is None else plus(out, up_bias * self.scale)

    def delta(self, kernel: jax.Array) -> jax.Array:
        update = self._matrix()
        return kernel.astype(jnp.float32) @ update if self.position == "sequential" else update

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        own = self._constant()
        if self.position == "parallel" or bias is None:
            return own
        moved = row_product(bias, self._matrix())
        return moved if own is None else moved + own

    def transpose(self) -> Bottleneck:
        raise UnsupportedError(f"{type(self).__name__} does not apply to embeddings.")

    def _hidden(self, call: Call) -> jax.Array:
        if self.position == "sequential":
            hidden = product(call.y, self.down, accumulator(call.y))
        elif call.kind == "dense":
            hidden = product(call.x, self.down, accumulator(call.x))
        else:
            hidden = call.linear(call.x, self.down.astype(call.y.dtype))
        return narrow(hidden if self.down_bias is None else plus(hidden, self.down_bias))

    def _between(self, hidden: jax.Array) -> jax.Array:
        return hidden

    def _output_side(self, call: Call) -> tuple[jax.Array, jax.Array | None]:
        return self.up, self.up_bias

    def _matrix(self) -> jax.Array:
        return self.down.astype(jnp.float32) @ self.up.astype(jnp.float32) * self.scale

    def _constant(self) -> jax.Array | None:
        """What it adds where its source is zero."""
        if self.down_bias is None:
            return None if self.up_bias is None else self.up_bias.astype(jnp.float32) * self.scale
        constant = row_product(self.down_bias, self.up)
        return (constant if self.up_bias is None else constant + self.up_bias) * self.scale


@struct.dataclass
class NonlinearBottleneck(Bottleneck):
    """An adapter ``scale * (act(source @ down + down_bias) @ up + up_bias)``; it has no dense update.

    Attributes:
      activation: one of `ACTIVATIONS`; the others as in `Bottleneck`.

    Example:
      >>> NonlinearBottleneck(jnp.ones((3, 1)), jnp.ones((1, 3)), activation="relu").record.delta
      False
    """

    activation: str = struct.field(pytree_node=False, default="gelu")

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv"}), delta=False)

    def delta(self, kernel: jax.Array) -> jax.Array:
        raise UnsupportedError(
            f"An adapter with activation {self.activation!r} is not a linear update: it has no delta and cannot be merged. "
            "Keep it as an adapter, or use activation=None."
        )

    def _between(self, hidden: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](hidden)


def product(x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """``x [*batch, ..., k] @ w [*batch, k, n]`` in the dtype of ``x``."""
    return over_batch(lambda x, w: dot(x, w, out_dtype), w.ndim - 2)(x, w)


def plus(x: jax.Array, bias: jax.Array) -> jax.Array:
    """``x [*batch, ..., n]`` plus ``bias [*batch, n]``."""
    return x + bias.reshape(*bias.shape[:-1], *[1] * (x.ndim - bias.ndim), bias.shape[-1]).astype(x.dtype)


def accumulator(x: jax.Array) -> jnp.dtype:
    """The dtype products of ``x`` are accumulated in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def row_product(v: jax.Array, m: jax.Array) -> jax.Array:
    """``v [*batch, k] @ m [*batch, k, n]`` in float32."""
    return (v.astype(jnp.float32)[..., None, :] @ m.astype(jnp.float32))[..., 0, :]
