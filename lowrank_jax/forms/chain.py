"""Chain: several forms on one weight, each acting on what the ones before it left."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, Form, Record


@struct.dataclass
class Chain:
    """Forms applied one after another; low-rank updates simply add up.

    Example:
      >>> from lowrank_jax.forms import LowRank
      >>> one = LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
      >>> Chain((one, one)).delta(jnp.zeros((2, 2)))
      Array([[2., 2.],
             [2., 2.]], dtype=float32)
    """

    forms: tuple[Form, ...]

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv", "embed"}))

    def apply(self, call: Call) -> jax.Array:
        for form in self.forms:
            call = call._replace(y=form.apply(call))
        return call.y

    def delta(self, kernel: jax.Array) -> jax.Array:
        weight = kernel.astype(jnp.float32)
        for form in self.forms:
            weight = weight + form.delta(weight)
        return weight - kernel.astype(jnp.float32)

    def transpose(self) -> Chain:
        return Chain(tuple(form.transpose() for form in self.forms))
