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

    @property
    def dropout(self) -> float:
        """Above 0 if any of the forms drops something in training."""
        return max(getattr(form, "dropout", 0.0) for form in self.forms)

    def apply(self, call: Call) -> jax.Array:
        for form in self.forms:
            call = call._replace(y=form.apply(call))
        return call.y

    def delta(self, kernel: jax.Array) -> jax.Array:
        weight = kernel.astype(jnp.float32)
        for form in self.forms:
            weight = weight + form.delta(weight)
        return weight - kernel.astype(jnp.float32)

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        weight, total = kernel.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)
        for form in self.forms:
            change = form.delta_bias(weight, total)
            weight = weight + form.delta(weight)
            total = total if change is None else change if total is None else total + change
        return None if total is None else total if bias is None else total - bias.astype(jnp.float32)

    def transpose(self) -> Chain:
        return Chain(tuple(form.transpose() for form in self.forms))
