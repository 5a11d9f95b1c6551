"""Tucker: one factor for each axis of an N-d kernel and a core between them (FLoRA, convolutions of any rank)."""

from __future__ import annotations

import string
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record
from lowrank_jax.forms.low_rank import LowRank


@struct.dataclass
class Tucker(KeepsBias):
    """Factors of a Tucker update ``scale * core x_1 u_1 ... x_k u_k x_out v``.

    Attributes:
      core: ``[*batch, r_1, ..., r_k, r_out]``.
      inputs: one ``[*batch, n_i, r_i]`` for each in axis of the kernel, in the kernel's order (a convolution's window axes
        first, then its input channels).
      output: ``[*batch, n_out, r_out]``.
      scale, dropout: as in `LowRank`.

    The in modes contracted with the core are exactly a LowRank ``a`` of rank ``r_out``, so the form is applied as that: the
    small product costs ``n_in * r_1 ... r_out`` once a step.

    Example:
      >>> import jax.numpy as jnp
      >>> form = Tucker(jnp.ones((1, 1, 2)), (jnp.ones((3, 1)), jnp.ones((4, 1))), jnp.ones((5, 2)))
      >>> form.delta(jnp.zeros((12, 5))).shape
      (12, 5)
    """

    core: jax.Array
    inputs: tuple[jax.Array, ...]
    output: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv"}), low_rank=True)

    def as_low_rank(self) -> LowRank:
        k = len(self.inputs)
        rows, ranks = string.ascii_lowercase[:k], string.ascii_uppercase[:k]
        factors = ",".join(f"...{n}{r}" for n, r in zip(rows, ranks, strict=True))
        a = jnp.einsum(f"...{ranks}Z,{factors}->...{rows}Z", self.core, *self.inputs)
        a = a.reshape(*self.output.shape[:-2], -1, self.output.shape[-1])
        return LowRank(a, jnp.swapaxes(self.output, -1, -2), scale=self.scale, dropout=self.dropout)

    def apply(self, call: Call) -> jax.Array:
        return self.as_low_rank().apply(call)

    def delta(self, kernel: jax.Array) -> jax.Array:
        return self.as_low_rank().delta(kernel)

    def transpose(self) -> LowRank:
        return self.as_low_rank().transpose()
