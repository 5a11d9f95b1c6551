"""InputBottleneck: a linear bottleneck in front of a weight."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, Record
from lowrank_jax.forms.bottleneck import Bottleneck, accumulator, product, row_product


@struct.dataclass
class InputBottleneck(Bottleneck):
    """A linear adapter in front of a weight: ``x + scale * ((x @ down + down_bias) @ up + up_bias)`` is what the weight sees.

    Attributes:
      up: ``[*batch, r, n_in]``, up_bias: ``[*batch, n_in]`` or None; the others as in `Bottleneck`.

    Acts as a parallel adapter whose output side went through the weight: a product of ``r`` rows, not one of every token.

    Example:
      >>> form = InputBottleneck(jnp.ones((3, 1)), jnp.ones((1, 3)))
      >>> form.delta(2 * jnp.eye(3))[0]
      Array([2., 2., 2.], dtype=float32)
    """

    # A padded convolution sees zeros beyond its border, whatever is added to its input: a bias could not be merged.
    record: ClassVar[Record] = Record(kinds=frozenset({"dense"}), reads_kernel=True)

    def delta(self, kernel: jax.Array) -> jax.Array:
        return self._matrix() @ kernel.astype(jnp.float32)

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        constant = self._constant()
        return None if constant is None else row_product(constant, kernel)

    def _output_side(self, call: Call) -> tuple[jax.Array, jax.Array | None]:
        def through(rows: jax.Array) -> jax.Array:
            return product(rows.astype(call.y.dtype), call.kernel, accumulator(call.y))

        bias = None if self.up_bias is None else through(self.up_bias[..., None, :])[..., 0, :]
        return through(self.up), bias
