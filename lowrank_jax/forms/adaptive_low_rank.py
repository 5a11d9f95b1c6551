"""AdaptiveLowRank: a low-rank update whose factors learn from each output at a rate of its own (ALLoRA)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record
from lowrank_jax.forms.low_rank import LowRank, column_squares
from lowrank_jax.forms.rescale import along


@struct.dataclass
class AdaptiveLowRank(KeepsBias):
    """The update of a `LowRank`, and another gradient of its factors.

    Attributes:
      low: the factors.
      eta: what output j teaches the factors is multiplied by ``1 / sqrt(||delta_j|| + 1 / eta^2)``, where ``delta_j`` is column j of the
        update: by ``eta`` while the column is zero, by less as it grows. The gradient of the input is the true one.
      side: ``input`` is the same map read backwards, where columns have become rows.

    Example:
      >>> form = AdaptiveLowRank(LowRank(jnp.ones((2, 1)), jnp.zeros((1, 3))), eta=4.0)
      >>> loss = lambda form, x: form.apply(Call("dense", x, jnp.zeros((1, 3)), jnp.zeros((2, 3)), jnp.matmul)).sum()
      >>> jax.grad(loss)(form, jnp.ones((1, 2))).low.b
      Array([[8., 8., 8.]], dtype=float32)
    """

    low: LowRank
    eta: float = struct.field(pytree_node=False, default=1.0)
    side: Literal["output", "input"] = struct.field(pytree_node=False, default="output")

    record: ClassVar[Record] = LowRank.record

    @property
    def dropout(self) -> float:
        """That of the factors' path."""
        return self.low.dropout

    def apply(self, call: Call) -> jax.Array:
        # The first path gives the output and the gradient of the input, the second the gradient of the factors and zeros: once compiled
        # it costs nothing on the way forward.
        y = call.y + jax.lax.stop_gradient(self.low).update(call)
        rates = self._rates()
        x = jax.lax.stop_gradient(call.x)
        if self.side == "input":
            return y + _lesson(self.low.update(call._replace(x=x * along(rates, x))), jnp.ones((), y.dtype))
        return y + _lesson(self.low.update(call._replace(x=x)), along(rates, y))

    def delta(self, kernel: jax.Array) -> jax.Array:
        return self.low.delta(kernel)

    def transpose(self) -> AdaptiveLowRank:
        side = "input" if self.side == "output" else "output"
        return self.replace(low=self.low.transpose(), side=side)  # type: ignore[attr-defined]

    def as_low_rank(self) -> LowRank:
        return self.low

    def _rates(self) -> jax.Array:
        low = jax.lax.stop_gradient(self.low.transpose() if self.side == "input" else self.low)
        lengths = jnp.sqrt(jnp.maximum(column_squares(*low.pair()), 0))
        return jax.lax.rsqrt(lengths + 1 / self.eta**2)


@jax.custom_vjp
def _lesson(update: jax.Array, rates: jax.Array) -> jax.Array:
    """Zeros, whose gradient reaches ``update`` multiplied by ``rates``."""
    return jnp.zeros_like(update)


def _forward(update: jax.Array, rates: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(update), rates


def _backward(rates: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return g * rates, None


_lesson.defvjp(_forward, _backward)
