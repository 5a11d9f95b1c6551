"""RandomBases: a sum of products of frozen random matrices, scaled by trained vectors: the form of VeRA and RandLoRA."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lowrank_jax import seeded
from lowrank_jax.batching import over_batch
from lowrank_jax.forms.base import Call, KeepsBias, Record
from lowrank_jax.forms.low_rank import LowRank


class Entries(NamedTuple):
    """How the entries of the matrices are drawn.

    Attributes:
      wide, narrow: bounds of the two sides. density: share of entries that are not zero, each plus or minus the bound; None: uniform
        between the bounds.
    """

    wide: float
    narrow: float
    density: float | None = None

    def draw(
        self, side: Literal["wide", "narrow"], seed: jax.Array, shape: tuple[int, ...], start: Any = None
    ) -> jax.Array:
        """The numbers of one side, ``shape`` float32; see `lowrank_jax.seeded.uniform`."""
        u, bound = seeded.uniform(seed, shape, start), getattr(self, side)
        return u * bound if self.density is None else jnp.where(jnp.abs(u) < self.density, jnp.sign(u) * bound, 0.0)


@struct.dataclass
class RandomBases(KeepsBias):
    """The update ``scale * sum_j wide_j diag(lam_j) narrow diag(gam_j)``, or its transpose.

    Attributes:
      lam: ``[*batch, n, r]``; gam: ``[*batch, n, m]``, where m is the width of the side that it scales.
      seed: ``[*batch, 2]`` uint32, of which the matrices are made wherever they are used; None: they are given.
      wide: ``[*batch, d, n, r]``, d being the width of the other side; narrow: ``[*batch, r, m]``; both None where there is a seed.
      d: that width. side: whether ``gam`` scales the outputs or the inputs.
      entries: how the entries are drawn from the seed.
      at_once: how many of the n r directions are multiplied at a time, at least one base.
      scale: multiplies the update; dropout: see `LowRank`.

    Neither the dense update nor more than ``at_once`` directions of the matrices exist at a time, in either pass. The backward pass
    keeps the input, or ``x wide`` if all directions fit at once, and makes the rest again.

    Example:
      >>> form = RandomBases(jnp.ones((1, 2)), jnp.ones((1, 3)), wide=jnp.ones((4, 1, 2)), narrow=jnp.ones((2, 3)), d=4)
      >>> form.delta(jnp.zeros((4, 3)))[0]
      Array([2., 2., 2.], dtype=float32)
    """

    lam: jax.Array
    gam: jax.Array
    seed: jax.Array | None = None
    wide: jax.Array | None = None
    narrow: jax.Array | None = None
    d: int = struct.field(pytree_node=False, default=0)
    side: Literal["out", "in"] = struct.field(pytree_node=False, default="out")
    entries: Entries = struct.field(pytree_node=False, default=Entries(1.0, 1.0))
    at_once: int = struct.field(pytree_node=False, default=128)
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    record: ClassVar[Record] = Record(kinds=frozenset({"dense", "conv", "embed"}), low_rank=True)

    def apply(self, call: Call) -> jax.Array:
        def term(part: _Part, x: jax.Array) -> jax.Array:
            return self._factors(part).update(call._replace(x=x))

        parts, count = self._parts()
        if count == 1:
            # The rank-wide products are all that the gradients need beside the matrices, so x itself is not kept.
            keep = jax.checkpoint_policies.dots_saveable
            return call.y + jax.checkpoint(term, policy=keep)(jax.tree.map(lambda p: p[0], parts), call.x)
        term = jax.checkpoint(term, prevent_cse=False)
        step = lambda total, part: (total + term(part, call.x).astype(jnp.float32), None)  # noqa: E731
        total, _ = lax.scan(step, jnp.zeros(call.y.shape, jnp.float32), parts)
        return call.y + total.astype(call.y.dtype)

    def delta(self, kernel: jax.Array) -> jax.Array:
        step = lambda total, part: (total + self._factors(part).delta(kernel), None)  # noqa: E731
        return lax.scan(step, jnp.zeros(kernel.shape, jnp.float32), self._parts()[0])[0]

    def transpose(self) -> RandomBases:
        return self.replace(side="in" if self.side == "out" else "out")  # type: ignore[attr-defined]

    def as_low_rank(self) -> LowRank:
        """All directions as one LowRank of rank n r."""
        whole: RandomBases = self.replace(at_once=math.prod(self.lam.shape[-2:]))  # type: ignore[attr-defined]
        return whole._factors(jax.tree.map(lambda p: p[0], whole._parts()[0]))

    def _parts(self) -> tuple[_Part, int]:
        """The bases a few at a time, stacked in front, and the number of parts; the last is padded with bases scaled by zero."""
        n, r = self.lam.shape[-2:]
        size = min(n, max(1, self.at_once // r))
        count = -(-n // size)
        split = functools.partial(_split, size=size, count=count)
        wide = None if self.wide is None else split(self.wide)
        return _Part(jnp.arange(count) * size, split(self.lam), split(self.gam), wide), count

    def _factors(self, part: _Part) -> LowRank:
        make = over_batch(functools.partial(self._make, part.start), self.lam.ndim - 2)
        a, mid, b = make(self.seed, part.lam, part.gam, part.wide, self.narrow)
        return LowRank(a, b, mid, scale=self.scale, dropout=self.dropout)

    def _make(self, start: jax.Array, seed: Any, lam: jax.Array, gam: jax.Array, wide: Any, narrow: Any) -> Any:
        (size, r), m = lam.shape, gam.shape[-1]
        if seed is not None:
            wide = self.entries.draw("wide", seeded.fold(seed, 0), (self.d, size, r), (0, start, 0))
            narrow = self.entries.draw("narrow", seeded.fold(seed, 1), (r, m))
        wide = wide.reshape(self.d, size * r)
        scaled = (narrow * gam[:, None]).reshape(size * r, m)
        return (wide, lam.reshape(-1), scaled) if self.side == "out" else (scaled.T, lam.reshape(-1), wide.T)


class _Part(NamedTuple):
    """A few bases: the number of the first, and their vectors ``[*batch, size, ...]`` and matrices ``[*batch, d, size, r]``."""

    start: jax.Array
    lam: jax.Array
    gam: jax.Array
    wide: jax.Array | None


def _split(x: jax.Array, size: int, count: int) -> jax.Array:
    """The second last axis in ``count`` parts of ``size``, which become the first axis."""
    pad = [(0, 0)] * x.ndim
    pad[-2] = (0, size * count - x.shape[-2])
    x = jnp.pad(x, pad).reshape(*x.shape[:-2], count, size, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)
