"""Conformer: a bottleneck whose narrow part looks along the sequence."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Record, UnsupportedError
from lowrank_jax.forms.bottleneck import Bottleneck, plus

_EPSILON = 1e-5


@struct.dataclass
class ConformerBottleneck(Bottleneck):
    """An adapter ``down``, gate, depthwise convolution over the second to last axis, normalisation, SiLU, ``up``.

    Attributes:
      down: ``[*batch, n_source, 2 r]``, down_bias: ``[*batch, 2 r]``: values and gates; up, up_bias, position, scale: as in `Bottleneck`.
      taps: ``[*batch, k, r]``, taps_bias: ``[*batch, r]``: the convolution, one filter for each channel, zeros beyond the ends.
      gain, shift: ``[*batch, r]``, of the normalisation, which is over the channels of each position (layer norm).
      dropout: before ``up``.

    Example:
      >>> ConformerBottleneck.record.delta
      False
    """

    taps: jax.Array | None = None
    taps_bias: jax.Array | None = None
    gain: jax.Array | None = None
    shift: jax.Array | None = None

    record: ClassVar[Record] = Record(kinds=frozenset({"dense"}), delta=False)

    def delta(self, kernel: jax.Array) -> jax.Array:
        raise UnsupportedError("A Conformer adapter is not a linear update: it has no delta and cannot be merged.")

    def _between(self, hidden: jax.Array) -> jax.Array:
        assert self.taps is not None and self.taps_bias is not None and self.gain is not None and self.shift is not None
        if self.down.ndim > 2 or hidden.ndim < 3:
            raise UnsupportedError(
                f"A Conformer adapter convolves over time: its weight's input needs axes [batch, time, features], got {hidden.ndim} axes"
                f"{' and a weight with batch axes of its own (experts)' if self.down.ndim > 2 else ''}. Exclude the weight."
            )
        values, gates = jnp.split(hidden, 2, axis=-1)
        h = plus(_convolve(values * jax.nn.sigmoid(gates), self.taps), self.taps_bias)
        centred = h - h.mean(axis=-1, keepdims=True)
        h = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + _EPSILON)
        return jax.nn.silu(plus(h * self.gain.astype(h.dtype), self.shift))


def _convolve(x: jax.Array, taps: jax.Array) -> jax.Array:
    """``sum_j taps[j] * x[t + j - (k - 1) // 2]``: a sum of shifts, which maps over rows of adapters as a convolution would not."""
    k, steps = taps.shape[0], x.shape[-2]
    before = (k - 1) // 2
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(before, k - 1 - before), (0, 0)])
    return sum((padded[..., j : j + steps, :] * taps[j].astype(x.dtype) for j in range(k)), jnp.zeros_like(x))
