"""A weight that is still in its file: read when it is asked for, whole or one layer of a stack at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Unread:
    """A leaf of a parameter tree that costs no memory yet. Plans, `lowrank_jax.init`, `fold` and `quantize` take it for the weight.

    Every `dense` reads again and keeps nothing. Not for `model.apply`: `lowrank_jax.quantize` or `read` makes arrays of it.

    Attributes:
      shape, dtype: of the weight. stacked: whether its first axis is layers, one reader each. sharding: where it is to lie, or None.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, readers: Sequence[Callable[[], np.ndarray]], stacked: bool = False,
                 sharding: Any = None):  # fmt: skip
        self.shape, self.dtype, self.stacked, self.sharding = tuple(shape), jnp.dtype(dtype), stacked, sharding
        self._readers = tuple(readers)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def laid(self, sharding: Any) -> Unread:
        """The same weight, to lie elsewhere."""
        return Unread(self.shape, self.dtype, self._readers, self.stacked, sharding)

    def dense(self) -> jax.Array:
        """The weight."""
        return place(self.__array__(), self.sharding)

    def layers(self) -> Iterator[jax.Array]:
        """The weights of a stack, one after another."""
        if not self.stacked:
            yield from self.dense()
            return
        sharding = self.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        for reader in self._readers:
            yield place(np.array(reader(), self.dtype), sharding)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        # Always a copy: JAX may take over the buffer on a CPU, and a mapped file can change under it.
        out = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for i, reader in enumerate(self._readers):
            out[i if self.stacked else ...] = reader()
        return out


def read(params: Any) -> Any:
    """A tree of parameters with every `Unread` leaf read.

    Example:
      >>> read({"w": Unread((2,), "float32", [lambda: np.ones(2)])})["w"].tolist()
      [1.0, 1.0]
    """
    return jax.tree.map(lambda leaf: leaf.dense() if isinstance(leaf, Unread) else leaf, params)


def place(value: Any, sharding: Any) -> jax.Array:
    """An array on the devices, laid out by ``sharding`` (None leaves it to JAX)."""
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
