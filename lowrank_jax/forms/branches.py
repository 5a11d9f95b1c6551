"""Branches: several bottlenecks on one weight, side by side; each sees the weight's own input and output."""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import struct

from lowrank_jax.forms.base import Call, Record, UnsupportedError
from lowrank_jax.forms.bottleneck import Bottleneck


@struct.dataclass
class Branches:
    """Linear bottlenecks whose updates add up. In a `Chain` each would see what the ones before it left.

    Example:
      >>> import jax.numpy as jnp
      >>> one = Bottleneck(jnp.ones((2, 1)), jnp.ones((1, 2)))
      >>> Branches((one, one.replace(position="sequential"))).delta(2 * jnp.eye(2))
      Array([[3., 3.],
             [3., 3.]], dtype=float32)
    """

    parts: tuple[Bottleneck, ...]

    record: ClassVar[Record] = Bottleneck.record

    @property
    def dropout(self) -> float:
        """Above 0 if any of the branches drops something in training."""
        return max(part.dropout for part in self.parts)

    def apply(self, call: Call) -> jax.Array:
        y = call.y
        for n, part in enumerate(self.parts):
            rng = None if call.rng is None else jax.random.fold_in(call.rng, n)
            y = y + part.update(call._replace(rng=rng))
        return y

    def delta(self, kernel: jax.Array) -> jax.Array:
        first, *others = (part.delta(kernel) for part in self.parts)
        return sum(others, first)

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        changes = [change for part in self.parts if (change := part.delta_bias(kernel, bias)) is not None]
        return sum(changes[1:], changes[0]) if changes else None

    def transpose(self) -> Branches:
        raise UnsupportedError("Branches does not apply to embeddings.")
