"""Probe: a form that changes nothing and whose gradient is a statistic of the inputs it sees."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record


@struct.dataclass
class Probe(KeepsBias):
    """Collects the input covariance of a weight through the backward pass.

    Attributes:
      covariance: ``[*batch, n_in, n_in]`` float32, zeros; its gradient is the sum of ``x x^T`` over the inputs of every call.
      count: ``[*batch]`` float32, zero; its gradient is the number of inputs.

    Being a gradient, the sum goes through scans, remats, meshes and weights that are used twice like any other gradient does, and
    nothing is kept from one layer to the next.
    """

    covariance: jax.Array
    count: jax.Array

    record: ClassVar[Record] = Record(kinds=frozenset({"dense"}), rows=False)

    def apply(self, call: Call) -> jax.Array:
        return _observe(self.covariance, self.count, call.x, call.y)

    def delta(self, kernel: jax.Array) -> jax.Array:
        return jnp.zeros(kernel.shape, jnp.float32)

    def transpose(self) -> Probe:
        return self


@jax.custom_vjp
def _observe(covariance: jax.Array, count: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return y


def _forward(covariance: jax.Array, count: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple]:
    return y, (count, x)


def _backward(kept: tuple, g: jax.Array) -> tuple:
    count, x = kept
    flat = x.reshape(*count.shape, -1, x.shape[-1])
    # Accelerators multiply float32 as bfloat16 unless told otherwise; what is to be inverted should be better than that.
    covariance = jnp.einsum("...tn,...tm->...nm", flat, flat, precision="highest", preferred_element_type=jnp.float32)
    return covariance, jnp.full(count.shape, flat.shape[-2], jnp.float32), jnp.zeros_like(x), g


_observe.defvjp(_forward, _backward)
