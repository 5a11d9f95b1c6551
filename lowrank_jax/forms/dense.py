"""Dense: a full copy of the weight that takes its place, for full fine-tuning, heads, norms and biases; and DenseUpdate, what is added."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record


@struct.dataclass
class Dense(KeepsBias):
    """A weight that replaces the base's.

    Attributes:
      weight: ``[*batch, n_in, n_out]``, or the parameter's own shape at a site of kind ``param``.

    A bridge lays it into the parameters instead of the base's, so it costs no extra matmul; its gradient is dense.

    Example:
      >>> import jax.numpy as jnp
      >>> Dense(jnp.ones((2, 2))).delta(jnp.eye(2))
      Array([[0., 1.],
             [1., 0.]], dtype=float32)
    """

    weight: jax.Array

    record: ClassVar[Record] = Record(
        kinds=frozenset({"dense", "conv", "embed", "param"}), factored=False, rows=False, dense_gradient=True
    )

    def apply(self, call: Call) -> jax.Array:
        return call.y + call.linear(call.x, self.delta(call.kernel).astype(call.y.dtype))

    def delta(self, kernel: jax.Array) -> jax.Array:
        return self.weight.astype(jnp.float32) - kernel.astype(jnp.float32)

    def transpose(self) -> Dense:
        return Dense(jnp.swapaxes(self.weight, -1, -2))


@struct.dataclass
class DenseUpdate(KeepsBias):
    """A dense update: `Dense` without a copy of the weight, which the method does not need and would have to store.

    Attributes:
      change: ``[*batch, n_in, n_out]`` float32, what is added to the weight.

    A bridge adds it to the parameters, so it costs no extra matmul; its gradient is dense.

    Example:
      >>> import jax.numpy as jnp
      >>> DenseUpdate(jnp.ones((2, 1))).delta(jnp.zeros((2, 1))).tolist()
      [[1.0], [1.0]]
    """

    change: jax.Array

    record: ClassVar[Record] = Record(
        kinds=frozenset({"dense", "conv", "embed"}), factored=False, rows=False, dense_gradient=True
    )

    def apply(self, call: Call) -> jax.Array:
        return call.y + call.linear(call.x, self.change.astype(call.y.dtype))

    def delta(self, kernel: jax.Array) -> jax.Array:
        del kernel
        return self.change.astype(jnp.float32)

    def transpose(self) -> DenseUpdate:
        return DenseUpdate(jnp.swapaxes(self.change, -1, -2))
