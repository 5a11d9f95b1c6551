"""Rescale: a factor for every output of a weight, or for every input (IA3)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record, UnsupportedError
from lowrank_jax.forms.bottleneck import plus


@struct.dataclass
class Rescale:
    """Output channels multiplied by ``1 + change``, bias included.

    Attributes:
      change: ``[*batch, n_out]``.

    Example:
      >>> Rescale(jnp.array([1.0, 0.0])).delta(jnp.ones((1, 2)))
      Array([[1., 0.]], dtype=float32)
    """

    change: jax.Array

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv"}))

    def apply(self, call: Call) -> jax.Array:
        return call.y + call.y * along(self.change, call.y)

    def delta(self, kernel: jax.Array) -> jax.Array:
        return kernel.astype(jnp.float32) * self.change.astype(jnp.float32)[..., None, :]

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        return None if bias is None else bias.astype(jnp.float32) * self.change.astype(jnp.float32)

    def transpose(self) -> Rescale:
        raise UnsupportedError("Rescale does not apply to embeddings.")


@struct.dataclass
class InputRescale(KeepsBias):
    """Input channels multiplied by ``1 + change`` before the weight sees them.

    Attributes:
      change: ``[*batch, n_in]``, or ``[n_channels]`` for a convolution, the same at every place of its window.

    Example:
      >>> InputRescale(jnp.array([1.0, 0.0])).delta(jnp.ones((4, 1)))[:, 0]
      Array([1., 0., 1., 0.], dtype=float32)
    """

    change: jax.Array

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv"}), reads_kernel=True)

    def apply(self, call: Call) -> jax.Array:
        x = call.x + call.x * along(self.change, call.x)
        # The call's own output is not used, so under jit it is not computed either: one product, as without the adapter.
        y = call.linear(x, call.kernel.astype(call.y.dtype))
        return y if call.bias is None else plus(y, call.bias)

    def delta(self, kernel: jax.Array) -> jax.Array:
        places = kernel.shape[-2] // self.change.shape[-1]
        change = jnp.concatenate([self.change.astype(jnp.float32)] * places, axis=-1)
        return kernel.astype(jnp.float32) * change[..., None]

    def transpose(self) -> InputRescale:
        raise UnsupportedError("InputRescale does not apply to embeddings.")


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """``vector [*batch, n]`` with axes of size 1 where ``x [*batch, ..., n]`` has further ones, in the dtype of ``x``."""
    return vector.reshape(*vector.shape[:-1], *[1] * (x.ndim - vector.ndim), vector.shape[-1]).astype(x.dtype)
