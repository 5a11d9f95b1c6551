"""A weight held in eight or four bits a number, in the place of the dense one.

Flax takes it for a box around the weight: a module that asks for its parameter gets the dense weight, made where it is asked for, which
in a scanned or rematerialised layer is inside that layer. So a model runs on quantised parameters as it is, and one layer is dense at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta


class Kind(NamedTuple):
    """How a kind of quantisation is stored.

    Attributes:
      per_byte: numbers a byte. codes: dtype of the stored codes; scales: of the scale of each block.
    """

    per_byte: int
    codes: Any
    scales: Any


# The scale of an eight-bit block would lose more by rounding to bfloat16 (1/512) than the codes do.
KINDS = {"int8": Kind(1, jnp.int8, jnp.float32), "nf4": Kind(2, jnp.uint8, jnp.bfloat16)}

# The sixteen values of NormalFloat 4, QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """One quantised weight: a pytree of its codes and scales, with the shape and dtype of the dense weight.

    Blocks lie along the axis before the last, the input of a kernel. ``jnp.asarray(q)``, ``q[...]`` and `dense` are the dense weight.

    Attributes:
      codes: int8 ``[*batch, n_in, n_out]``; of nf4 uint8 ``[*batch, n_in / 2, n_out]``, where a block of ``b`` rows is ``b / 2`` rows of
        bytes: its first half in the lower four bits, the second in the upper.
      scales: ``[*batch, n_in / block, n_out]``, float32 of int8 and bfloat16 of nf4.
      kind: 'int8' or 'nf4'. dtype: of the dense weight.
    """

    codes: Any
    scales: Any
    kind: str = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, rows, columns = self.codes.shape
        return (*batch, rows * KINDS[self.kind].per_byte, columns)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """Numbers that share a scale."""
        return self.shape[-2] // self.scales.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes held, not those of the dense weight."""
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in (self.codes, self.scales))

    @property
    def sharding(self) -> Any:
        """That of the codes, whose axes are the weight's; None where they have none."""
        return None if isinstance(self.codes, jax.core.Tracer) else getattr(self.codes, "sharding", None)

    def dense(self) -> jax.Array:
        """The dense weight, computed in float32 and rounded to its dtype once."""
        *batch, blocks, columns = self.scales.shape
        codes = jnp.asarray(self.codes).reshape(*batch, blocks, -1, columns)
        scales = jnp.asarray(self.scales).astype(jnp.float32)[..., None, :]
        if self.kind == "nf4":
            wide = _nf4(jnp.concatenate([codes & 15, codes >> 4], axis=-2), scales)
        else:
            wide = codes.astype(jnp.float32) * scales
        return wide.reshape(self.shape).astype(self.dtype)

    def layers(self) -> Iterator[jax.Array]:
        """The dense weights of a stack, one after another."""
        for n in range(self.shape[0]):
            yield jax.tree.map(lambda part, n=n: part[n], self).dense()

    def __jax_array__(self) -> jax.Array:
        return self.dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.dense(), dtype)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.dense()[index]

    # What Flax asks of a box around a parameter.
    def unbox(self) -> Any:
        return self.dense()

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        return self


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is a quantised weight; an ``is_leaf`` for `jax.tree.map`."""
    return isinstance(leaf, Quantized)


def dense(leaf: Any) -> Any:
    """The array of a leaf: a quantised weight dequantised, one still in its file read, any other as it is.

    Example:
      >>> dense(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    return leaf.dense() if hasattr(leaf, "dense") else leaf


def layers(leaf: Any) -> Iterator[jax.Array]:
    """The dense weights of a stack, one after another: no more than one of a quantised or unread stack is dense."""
    return leaf.layers() if hasattr(leaf, "layers") else (leaf[n] for n in range(leaf.shape[0]))


def unbox(params: Any) -> Any:
    """``flax.core.meta.unbox`` that leaves quantised weights as they are."""
    boxed = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if is_quantized(leaf) else meta.unbox(leaf), params, is_leaf=boxed)


def _nf4(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The values of four-bit codes times their scales, float32.

    A tree of selections fuses into what reads it, where a lookup (gather) does not. It selects among scaled values: XLA would lay plain
    constants out in full, before the loop over layers.
    """
    values = [scales * np.float32(value) for value in NF4]
    for bit in range(4):
        upper = (codes >> bit & 1).astype(bool)
        values = [jnp.where(upper, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
