"""Sparse: an update that lives in a fixed set of entries of the kernel, alone or beside a low-rank one (`SparseLowRank`)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.batching import over_batch
from lowrank_jax.forms.base import Call, KeepsBias, Record
from lowrank_jax.forms.bottleneck import product

# A dense matrix, made where it is used, one layer at a time: an accelerator multiplies one faster than it gathers.
_RECORD = Record(kinds=frozenset({"dense", "conv", "embed"}), dense_gradient=True)


@struct.dataclass
class Sparse(KeepsBias):
    """Entries of a sparse update.

    Attributes:
      indices: ``[*batch, nnz]`` int32 positions in the flattened ``[n_in * n_out]`` kernel.
      values: ``[*batch, nnz]`` what is added there; equal indices add up.
      shape: ``(n_in, n_out)``.

    No dense matrix outlives its layer: the backward pass keeps the input and the entries, scatters them again for the gradient of the
    input, and gathers that of ``values`` from one product.

    Example:
      >>> import jax.numpy as jnp
      >>> Sparse(jnp.array([1]), jnp.array([2.0]), shape=(2, 2)).delta(jnp.zeros((2, 2)))
      Array([[0., 2.],
             [0., 0.]], dtype=float32)
    """

    indices: jax.Array
    values: jax.Array
    shape: tuple[int, int] = struct.field(pytree_node=False)

    record: ClassVar[Record] = _RECORD

    def apply(self, call: Call) -> jax.Array:
        return call.y + _times_delta(call, self)

    def delta(self, kernel: jax.Array) -> jax.Array:
        del kernel
        n_in, n_out = self.shape
        scatter = lambda i, v: jnp.zeros(n_in * n_out, jnp.float32).at[i].add(v.astype(jnp.float32))  # noqa: E731
        scatter = over_batch(scatter, self.values.ndim - 1)
        return scatter(self.indices, self.values).reshape(*self.values.shape[:-1], n_in, n_out)

    def transpose(self) -> Sparse:
        n_in, n_out = self.shape
        row, column = self.indices // n_out, self.indices % n_out
        return Sparse(column * n_in + row, self.values, (n_out, n_in))


@struct.dataclass
class SparseLowRank(KeepsBias):
    """The update ``scale * a @ b`` plus entries of a sparse one.

    Attributes:
      a: ``[*batch, n_in, r]``; b: ``[*batch, r, n_out]``; scale: multiplies their product.
      sparse: the entries.

    Both are one dense matrix where they are used, as with `Sparse`: one product for each token, and nothing of it kept.

    Example:
      >>> sparse = Sparse(jnp.array([1]), jnp.array([2.0]), shape=(2, 2))
      >>> SparseLowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), sparse, scale=0.5).delta(jnp.zeros((2, 2)))
      Array([[0.5, 2.5],
             [0.5, 0.5]], dtype=float32)
    """

    a: jax.Array
    b: jax.Array
    sparse: Sparse
    scale: float = struct.field(pytree_node=False, default=1.0)

    record: ClassVar[Record] = _RECORD

    def apply(self, call: Call) -> jax.Array:
        return call.y + _times_delta(call, self)

    def delta(self, kernel: jax.Array) -> jax.Array:
        low_rank = self.a.astype(jnp.float32) @ self.b.astype(jnp.float32)
        return self.scale * low_rank + self.sparse.delta(kernel)

    def transpose(self) -> SparseLowRank:
        flip = lambda m: jnp.swapaxes(m, -1, -2)  # noqa: E731
        return SparseLowRank(flip(self.b), flip(self.a), self.sparse.transpose(), self.scale)


def _times_delta(call: Call, form: Any) -> jax.Array:
    """The input times the form's update, which is made again in the backward pass and not kept."""

    @jax.checkpoint
    def update(x: jax.Array, form: Any) -> jax.Array:
        dense = form.delta(call.kernel)
        if call.kind == "dense":
            return product(x, dense, call.y.dtype)  # the gradient of the float32 matrix is accumulated in float32
        return call.linear(x, dense.astype(call.y.dtype))

    return update(call.x, form)
