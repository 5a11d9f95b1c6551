"""How one linear call reads its input and writes its output, as labels of axes.

Every matmul of every module type (Dense, DenseGeneral, Einsum, somebody's own) is an einsum ``x,w->y``. Its labels say
which axes of the weight are contracted (*in*), which appear in the output only (*out*) and which run along with
the input (*batch*, for instance experts). From them follow the canonical views the forms work on:

    weight  [*batch, n_in, n_out]        input  [*batch, ..., n_in]        update  [*batch, ..., n_out]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Labels:
    """Axis labels of one call ``x,w->y``, one character an axis, ellipses already expanded.

    Example:
      >>> labels = Labels.parse("...d,dnh->...nh", x_ndim=3)
      >>> labels.batch, labels.inputs, labels.outputs
      ('', 'd', 'nh')
    """

    x: str
    w: str
    y: str

    @classmethod
    def parse(cls, equation: str, x_ndim: int) -> Labels:
        """Reads an explicit two-operand einsum equation; ``x_ndim`` is the rank of the input.

        Raises:
          ValueError: not ``x,w->y``, an ellipsis in the weight, or a rank that does not fit.
        """
        text = equation.replace(" ", "")
        operands, arrow, y = text.partition("->")
        x, comma, w = operands.partition(",")
        if not arrow or not comma or "," in w or "." in w:
            raise ValueError(
                f"Einsum equation {equation!r}: expected two operands and an explicit output without an "
                "ellipsis in the weight, such as '...d,dnh->...nh'."
            )
        if "..." in x:
            free = [c for c in _LETTERS if c not in text]
            extra = "".join(free[: x_ndim - (len(x) - 3)])
            x, y = x.replace("...", extra), y.replace("...", extra)
        if len(x) != x_ndim:
            raise ValueError(f"Einsum equation {equation!r} does not fit an input with {x_ndim} axes.")
        if set(w) - set(x) - set(y):
            raise ValueError(f"Einsum equation {equation!r} sums a weight axis on its own; that is not a matmul.")
        return cls(x, w, y)

    @property
    def batch(self) -> str:
        return "".join(c for c in self.w if c in self.x and c in self.y)

    @property
    def inputs(self) -> str:
        return "".join(c for c in self.w if c in self.x and c not in self.y)

    @property
    def outputs(self) -> str:
        return "".join(c for c in self.w if c not in self.x)

    @property
    def rest(self) -> str:
        return "".join(c for c in self.x if c not in self.w)

    def canonical_input(self, x: jax.Array) -> jax.Array:
        """``x`` as ``[*batch, *rest, n_in]``."""
        order = self.batch + self.rest + self.inputs
        x = _transpose(x, self.x, order)
        kept = len(order) - len(self.inputs)
        return x if len(self.inputs) == 1 else x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))

    def output(self, update: jax.Array, weight_shape: Sequence[int]) -> jax.Array:
        """``update [*batch, *rest, n_out]`` in the layout of the call's own output.

        ``weight_shape`` is the shape of the call's weight, which holds the sizes of the out axes.
        """
        sizes = dict(zip(self.w, weight_shape, strict=True))
        update = update.reshape(*update.shape[:-1], *(sizes[c] for c in self.outputs))
        return _transpose(update, self.batch + self.rest + self.outputs, self.y)

    def canonical_output(self, y: jax.Array) -> jax.Array:
        """The call's own output as ``[*batch, *rest, n_out]``; inverse of `output`."""
        y = _transpose(y, self.y, self.batch + self.rest + self.outputs)
        kept = y.ndim - len(self.outputs)
        return y if len(self.outputs) == 1 else y.reshape(*y.shape[:kept], math.prod(y.shape[kept:]))


def _transpose(array: jax.Array, labels: str, order: str) -> jax.Array:
    return array if labels == order else jnp.transpose(array, [labels.index(c) for c in order])


def dense_equation(axis: Sequence[int], batch_dims: Sequence[int], n_features: int, x_ndim: int) -> str:
    """The equation of a Flax ``DenseGeneral`` call: contracted axes, batch axes, number of output axes.

    Example:
      >>> dense_equation((-2, -1), (), 1, x_ndim=4)
      'abcd,cde->abe'
    """
    x = _LETTERS[:x_ndim]
    contracted = [x[a] for a in axis]
    batch = [x[a] for a in batch_dims]
    features = _LETTERS[x_ndim : x_ndim + n_features]
    kept = [c for c in x if c not in contracted and c not in batch]
    return f"{x},{''.join([*batch, *contracted])}{features}->{''.join([*batch, *kept])}{features}"
