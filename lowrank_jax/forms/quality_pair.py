"""QualityPair: two LoRAs on one weight, weighted for each row of a batch by a signal that comes with it (PETALface)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms._dropout import drop
from lowrank_jax.forms.base import Call, KeepsBias, Record, UnsupportedError
from lowrank_jax.forms.bottleneck import product

SIGNAL = "quality"


@struct.dataclass
class QualityPair(KeepsBias):
    """The update ``scale * ((1 - w) x a_1 b_1 + w x a_2 b_2)`` with ``w = 0.5 + (quality - threshold)`` for each row.

    Attributes:
      a: ``[*batch, n_in, 2 r]``, the first LoRA's directions in front; b: ``[*batch, 2 r, n_out]``.
      scale: multiplies the update. threshold: the quality at which both have the same weight.
      dropout: probability with which an element of either LoRA's output is dropped during training.
      clip: whether ``w`` is kept in [0, 1].

    A row of the signal may stand for several rows of the call, one after another: the windows of an image.

    Example:
      >>> x, y, signal = jnp.ones((2, 1)), jnp.zeros((2, 1)), {"quality": jnp.array([0.0, 1.0])}
      >>> call = Call("dense", x, y, jnp.ones((1, 1)), jnp.matmul, signals=signal)
      >>> QualityPair(jnp.ones((1, 2)), jnp.array([[3.0], [5.0]]), threshold=0.5).apply(call)[:, 0]
      Array([3., 5.], dtype=float32)
    """

    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)
    threshold: float = struct.field(pytree_node=False, default=0.5)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    clip: bool = struct.field(pytree_node=False, default=True)

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv", "embed"}), delta=False)

    def apply(self, call: Call) -> jax.Array:
        dtype = call.y.dtype
        if call.kind == "dense":
            hidden = product(call.x, self.a, jnp.promote_types(dtype, jnp.float32))
        else:
            hidden = call.linear(call.x, self.a.astype(dtype))
        # The weights meet the narrow activation: on the outputs they would cost two passes over the widest array.
        hidden = (hidden * self._weights(call, hidden)).astype(dtype)
        if not self.dropout or call.rng is None:
            return call.y + product(hidden, self.b, dtype)
        out = call.y
        for n, (h, b) in enumerate(zip(jnp.split(hidden, 2, -1), jnp.split(self.b, 2, -2), strict=True)):
            out = out + drop(product(h, b, dtype), self.dropout, jax.random.fold_in(call.rng, n))
        return out

    def delta(self, kernel: jax.Array) -> jax.Array:
        raise UnsupportedError(
            "A pair of LoRAs weighted by the quality of each row is not one update: it cannot be merged. "
            "Keep it as an adapter, or fix the quality with lowrank_jax.at_quality."
        )

    def transpose(self) -> QualityPair:
        flip = lambda m: jnp.swapaxes(m, -1, -2)  # noqa: E731
        return self.replace(a=flip(self.b), b=flip(self.a))  # type: ignore[attr-defined]

    def _weights(self, call: Call, hidden: jax.Array) -> jax.Array:
        """``scale`` times the weight of every direction in every row, as wide as ``hidden``."""
        if SIGNAL not in call.signals:
            raise ValueError(
                f"petalface weighs each row by its image's quality: pass signals={{{SIGNAL!r}: [one for each image]}}, or fix the "
                "quality with lowrank_jax.at_quality."
            )
        if self.a.ndim > 2:
            raise UnsupportedError(
                "petalface does not apply to a matmul with batch axes of its own (experts), whose rows are not the batch's; exclude it."
            )
        quality = jnp.asarray(call.signals[SIGNAL], jnp.float32)
        if hidden.shape[0] % quality.shape[0]:
            raise ValueError(
                f"petalface: {hidden.shape[0]} rows at this site are not a multiple of the {quality.shape[0]} qualities given; give one "
                "for each image of the batch."
            )
        second = weight_of(quality, self.threshold, self.clip)
        each = jnp.repeat(jnp.stack([1 - second, second], -1), self.a.shape[-1] // 2, axis=-1) * self.scale
        rows = jnp.repeat(each, hidden.shape[0] // quality.shape[0], axis=0)
        return rows.reshape(rows.shape[0], *[1] * (hidden.ndim - 2), rows.shape[1])


def weight_of(quality: jax.Array | float, threshold: float, clip: bool) -> jax.Array:
    """The weight of the second LoRA."""
    weight = 0.5 + (jnp.asarray(quality, jnp.float32) - threshold)
    return jnp.clip(weight, 0, 1) if clip else weight
