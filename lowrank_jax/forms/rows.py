"""Rows: some rows of a table with other values, the form of tokens that are trained while the vocabulary stays."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.batching import over_batch
from lowrank_jax.forms.base import Call, KeepsBias, Record
from lowrank_jax.forms.bottleneck import product


@struct.dataclass
class Rows(KeepsBias):
    """A table of which some rows are replaced.

    Attributes:
      rows: ``[*batch, k, n]``, what stands in them. indices: ``[*batch, k]`` int32, 1 + the row of the table, all different; 0: none.
      side: which axis of the weight counts the table's rows: ``in`` (an embedding) or ``out`` (an output head, or attending).

    Example:
      >>> Rows(jnp.array([[5.0, 6.0]]), jnp.array([2])).delta(jnp.ones((3, 2))).tolist()
      [[0.0, 0.0], [4.0, 5.0], [0.0, 0.0]]
    """

    rows: jax.Array
    indices: jax.Array
    side: Literal["in", "out"] = struct.field(pytree_node=False, default="in")

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "embed"}), reads_kernel=True)

    def apply(self, call: Call) -> jax.Array:
        change, dtype = self._change(call.kernel), call.y.dtype
        if call.kind == "embed":
            update = _looked_up(call.x, change, self.indices, call.kernel.shape[-2])
            return (call.y + update).astype(dtype)
        if self.side == "in":
            own = over_batch(lambda x, i: jnp.take(x, i - 1, axis=-1), self.indices.ndim - 1)(call.x, self.indices)
            return call.y + product(own, change, dtype)
        own = product(call.x, jnp.swapaxes(change, -1, -2), dtype)
        # Index -1 stands for none, whose change is zero.
        return over_batch(lambda y, i, u: y.at[..., i - 1].add(u), self.indices.ndim - 1)(call.y, self.indices, own)

    def delta(self, kernel: jax.Array) -> jax.Array:
        table = kernel if self.side == "in" else jnp.swapaxes(kernel, -1, -2)
        spread = over_batch(
            lambda i, c: jnp.zeros(table.shape[-2:], jnp.float32).at[i - 1].add(c), self.indices.ndim - 1
        )
        update = spread(self.indices, self._change(kernel))
        return update if self.side == "in" else jnp.swapaxes(update, -1, -2)

    def transpose(self) -> Rows:
        return self.replace(side="out" if self.side == "in" else "in")  # type: ignore[attr-defined]

    def _change(self, kernel: jax.Array) -> jax.Array:
        """New rows less the old, ``[*batch, k, n]`` float32; zero for index 0."""
        take = lambda w, i: jnp.take(w, i - 1, axis=0 if self.side == "in" else 1, mode="wrap")  # noqa: E731
        old = over_batch(take, self.indices.ndim - 1)(kernel, self.indices)
        old = old if self.side == "in" else jnp.swapaxes(old, -1, -2)
        change = self.rows.astype(jnp.float32) - old.astype(jnp.float32)
        return jnp.where(self.indices[..., None] > 0, change, 0)


def _looked_up(ids: jax.Array, change: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    """The change of each id's row. Its place among the changed rows comes from a table of integers, so nothing wide is scattered."""
    place = jnp.zeros(size + 1, jnp.int32).at[indices].set(jnp.arange(1, len(indices) + 1))
    return jnp.pad(change, ((1, 0), (0, 0)))[place[ids + 1]]
