"""LowRank: the update ``scale * a @ mid @ b``, the form of LoRA, LaMDA, PiSSA, LoRA-XS and most of the family."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from lowrank_jax.batching import over_batch
from lowrank_jax.forms._dropout import drop
from lowrank_jax.forms._matmul import low_rank_matmul
from lowrank_jax.forms.base import Call, KeepsBias, Leaf, Record
from lowrank_jax.remat import narrow
from lowrank_jax.sites import Site


@struct.dataclass
class LowRank(KeepsBias):
    """Factors of a low-rank update.

    Attributes:
      a: ``[*batch, n_in, r]``; b: ``[*batch, r, n_out]``.
      mid: None, a vector ``[*batch, r]`` or a matrix ``[*batch, r, r]`` between them.
      scale: multiplies the update.
      dropout: probability with which an element of the input is dropped on this path during training. An embedding lookup has
        no real-valued input and is not dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> form = LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)
      >>> form.delta(jnp.zeros((4, 3)))[0]
      Array([1., 1., 1.], dtype=float32)
    """

    a: jax.Array
    b: jax.Array
    mid: jax.Array | None = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv", "embed"}), low_rank=True)

    def apply(self, call: Call) -> jax.Array:
        return call.y + self.update(call)

    def update(self, call: Call) -> jax.Array:
        """What `apply` adds to the output."""
        x = call.x
        if jnp.issubdtype(x.dtype, jnp.inexact):  # an embedding's input are indices
            x = drop(x, self.dropout, call.rng)
        if call.kind == "dense":
            # Batch axes of the matmul itself, such as experts.
            product = over_batch(functools.partial(low_rank_matmul, scale=self.scale), self.a.ndim - 2)
            update = product(x, self.a, self.mid, self.b)
        else:
            update = _after(narrow(call.linear(x, self.a.astype(call.y.dtype))), self.mid, self.b, self.scale)
        return update.astype(call.y.dtype)

    def delta(self, kernel: jax.Array) -> jax.Array:
        del kernel
        a = self.a.astype(jnp.float32)
        return _after(a, self.mid, self.b, self.scale)

    def transpose(self) -> LowRank:
        flip = lambda m: jnp.swapaxes(m, -1, -2)  # noqa: E731
        mid = self.mid if self.mid is None or self.mid.ndim < self.a.ndim else flip(self.mid)
        return self.replace(a=flip(self.b), b=flip(self.a), mid=mid)  # type: ignore[attr-defined]

    def as_low_rank(self) -> LowRank:
        return self

    def pair(self) -> tuple[jax.Array, jax.Array]:
        """``a`` and ``scale * mid @ b`` in float32, whose product is the update."""
        one = jnp.eye(self.a.shape[-1], dtype=jnp.float32)
        return self.a.astype(jnp.float32), _after(one, self.mid, self.b, self.scale)


def column_squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """The squared length of each column of ``a @ b``, ``[*batch, n_out]``, from ``b_j^T (a^T a) b_j``: the product is not made."""
    return (b * (jnp.einsum("...ir,...is->...rs", a, a) @ b)).sum(-2)


def _after(z: jax.Array, mid: jax.Array | None, b: jax.Array, scale: float) -> jax.Array:
    """``scale * z @ mid @ b`` in the dtype of ``z``."""
    if mid is not None:
        mid = mid.astype(z.dtype)
        z = z * mid[..., None, :] if mid.ndim < b.ndim else z @ mid
    return (z @ b.astype(z.dtype)) * jnp.asarray(scale, z.dtype)


def a_leaf(site: Site, rank: int, **how: object) -> Leaf:
    """The input-side factor's description, ``[n_in, rank]``."""
    return Leaf((site.n_in, rank), ("in", "rank"), **how)  # type: ignore[arg-type]


def b_leaf(site: Site, rank: int, **how: object) -> Leaf:
    """The output-side factor's description, ``[rank, n_out]``."""
    return Leaf((rank, site.n_out), ("rank", "out"), **how)  # type: ignore[arg-type]


def mid_leaf(site: Site, rank: int, **how: object) -> Leaf:
    """The square core's description, ``[rank, rank]``."""
    del site
    return Leaf((rank, rank), ("rank", "rank"), **how)  # type: ignore[arg-type]
