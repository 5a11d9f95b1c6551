"""Sparse: an update that lives in a fixed set of entries of the kernel."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.forms.base import Call, KeepsBias, Record


@struct.dataclass
class Sparse(KeepsBias):
    """Entries of a sparse update.

    Attributes:
      indices: ``[*batch, nnz]`` int32 positions in the flattened ``[n_in * n_out]`` kernel.
      values: ``[*batch, nnz]`` what is added there; equal indices add up.
      shape: ``(n_in, n_out)``.

    The update is scattered into a dense matrix where it is used, one layer at a time, because an accelerator multiplies
    a dense matrix faster than it gathers. No dense gradient is kept: that of ``values`` is a gather from one product.

    Example:
      >>> import jax.numpy as jnp
      >>> Sparse(jnp.array([1]), jnp.array([2.0]), shape=(2, 2)).delta(jnp.zeros((2, 2)))
      Array([[0., 2.],
             [0., 0.]], dtype=float32)
    """

    indices: jax.Array
    values: jax.Array
    shape: tuple[int, int] = struct.field(pytree_node=False)

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv", "embed"}), dense_gradient=True)

    def apply(self, call: Call) -> jax.Array:
        return call.y + call.linear(call.x, self.delta(call.kernel).astype(call.y.dtype))

    def delta(self, kernel: jax.Array) -> jax.Array:
        del kernel
        n_in, n_out = self.shape
        scatter = lambda i, v: jnp.zeros(n_in * n_out, jnp.float32).at[i].add(v.astype(jnp.float32))  # noqa: E731
        for _ in self.values.shape[:-1]:
            scatter = jax.vmap(scatter)
        return scatter(self.indices, self.values).reshape(*self.values.shape[:-1], n_in, n_out)

    def transpose(self) -> Sparse:
        n_in, n_out = self.shape
        row, column = self.indices // n_out, self.indices % n_out
        return Sparse(column * n_in + row, self.values, (n_out, n_in))
