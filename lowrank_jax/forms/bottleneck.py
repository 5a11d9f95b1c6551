"""Bottleneck: a small network beside a weight (parallel) or behind it (sequential)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, Record, UnsupportedError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@struct.dataclass
class Bottleneck:
    """Factors of an adapter ``scale * act(source @ down) @ up`` added to a weight's output.

    Attributes:
      down: ``[*batch, n_source, r]``, where the source is the weight's input (parallel) or its output (sequential).
      up: ``[*batch, r, n_out]``.
      activation: one of `ACTIVATIONS`, or None for a linear adapter, which alone has a delta.
      sequential: whether the source is the weight's own output, bias included.

    Example:
      >>> import jax.numpy as jnp
      >>> form = Bottleneck(jnp.ones((3, 1)), jnp.ones((1, 3)), sequential=True)
      >>> form.delta(jnp.eye(3))[0]
      Array([1., 1., 1.], dtype=float32)
    """

    down: jax.Array
    up: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)
    activation: str | None = struct.field(pytree_node=False, default=None)
    sequential: bool = struct.field(pytree_node=False, default=False)

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv"}))

    def apply(self, call: Call) -> jax.Array:
        down, up = (f.astype(call.y.dtype) for f in (self.down, self.up))
        hidden = _matmul(call.y, down) if self.sequential else call.linear(call.x, down)
        if self.activation is not None:
            hidden = ACTIVATIONS[self.activation](hidden)
        return call.y + _matmul(hidden, up) * jnp.asarray(self.scale, call.y.dtype)

    def delta(self, kernel: jax.Array) -> jax.Array:
        update = self._linear()
        return kernel.astype(jnp.float32) @ update if self.sequential else update

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        """The update of the weight's bias ``[*batch, n_out]``; None for a parallel adapter, which leaves it alone."""
        if not self.sequential or bias is None:
            return None
        return (bias.astype(jnp.float32)[..., None, :] @ self._linear())[..., 0, :]

    def transpose(self) -> Bottleneck:
        raise UnsupportedError("Bottleneck does not apply to embeddings.")

    def _linear(self) -> jax.Array:
        if self.activation is not None:
            raise UnsupportedError(
                f"A Bottleneck with activation {self.activation!r} is not a linear update: it has no delta and cannot be merged. "
                "Keep it as an adapter, or use activation=None."
            )
        return (self.down.astype(jnp.float32) @ self.up.astype(jnp.float32)) * self.scale


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    for_one = jnp.matmul
    for _ in w.shape[:-2]:
        for_one = jax.vmap(for_one)
    return for_one(x, w)
