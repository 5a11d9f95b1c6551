"""Magnitude: a low-rank update of the directions of a weight's columns, whose lengths are parameters of their own (DoRA)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record
from lowrank_jax.forms.bottleneck import plus, product
from lowrank_jax.forms.low_rank import LowRank, column_squares
from lowrank_jax.forms.rescale import along


@struct.dataclass
class Magnitude(KeepsBias):
    """The weight ``W magnitude / ||W||`` with ``W = kernel + low``, by columns: the norm is over ``n_in``.

    Attributes:
      low: the low-rank update, its dropout included, which the weight's own path does not see.
      magnitude: ``[*batch, n_out]``, the length of each column; 0 takes the column as long as it is.
      norm: whether the backward pass takes ``||W||`` for a ``constant`` (DoRA, 4.3) or not (``differentiated``).
      side: ``input`` is the same map read backwards: what is scaled then are rows, and ``magnitude`` is ``[*batch, n_in]``.

    The norm comes from ``K^T a`` and products of the rank's size, never from a matrix of the weight's.

    Example:
      >>> form = Magnitude(LowRank(jnp.zeros((2, 1)), jnp.zeros((1, 2))), jnp.array([5.0, 0.0]))
      >>> form.delta(jnp.eye(2))
      Array([[4., 0.],
             [0., 0.]], dtype=float32)
    """

    low: LowRank
    magnitude: jax.Array
    norm: Literal["constant", "differentiated"] = struct.field(pytree_node=False, default="constant")
    side: Literal["output", "input"] = struct.field(pytree_node=False, default="output")

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv", "embed"}), reads_kernel=True)

    @property
    def dropout(self) -> float:
        """That of the low-rank path."""
        return self.low.dropout

    def apply(self, call: Call) -> jax.Array:
        change = self._change(self._norms(call.kernel, call.y.dtype))
        if self.side == "output":
            update = self.low.update(call)
            # The change of the factor is added, not the factor multiplied: rounded to bfloat16, 1.001 would be 1.
            scaled = (call.linear_output() + update) * along(change, call.y)
            return call.y + (update + scaled)
        x = call.x + call.x * along(change, call.x)
        # The call's own output is not used, so under jit it is not computed either.
        y = call.linear(x, call.kernel.astype(call.y.dtype)) + self.low.update(call._replace(x=x))
        return y if call.bias is None else plus(y, call.bias)

    def delta(self, kernel: jax.Array) -> jax.Array:
        update = self.low.delta(kernel)
        weight = kernel.astype(jnp.float32) + update
        axis = -2 if self.side == "output" else -1
        change = self._change(jnp.linalg.norm(weight, axis=axis))
        return update + weight * jnp.expand_dims(change, axis)

    def transpose(self) -> Magnitude:
        side = "input" if self.side == "output" else "output"
        return self.replace(low=self.low.transpose(), side=side)  # type: ignore[attr-defined]

    def _change(self, norms: jax.Array) -> jax.Array:
        """``magnitude / norm - 1``, and 0 where the magnitude is 0; float32."""
        magnitude = self.magnitude.astype(jnp.float32)
        chosen = magnitude != 0
        return jnp.where(chosen, (magnitude - norms) / jnp.where(chosen, norms, 1), 0)

    def _norms(self, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The columns' norms, from ``||K_j + a b_j||^2 = ||K_j||^2 + 2 (K^T a)_j b_j + b_j^T (a^T a) b_j``."""
        low = self.low
        if self.side == "input":
            kernel, low = jnp.swapaxes(kernel, -1, -2), low.transpose()
        if self.norm == "constant":
            low = jax.lax.stop_gradient(low)
        a, b = low.pair()
        crossed = product(jnp.swapaxes(kernel, -1, -2).astype(dtype), a, jnp.dtype(jnp.float32))
        own = jnp.square(kernel.astype(jnp.float32)).sum(-2)
        square = own + 2 * (b * jnp.swapaxes(crossed, -1, -2)).sum(-2) + column_squares(a, b)
        # Rounding must not make a length imaginary.
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
