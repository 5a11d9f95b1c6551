"""What can be cut from a model, and what is kept of one weight."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.sites import Site


class Units(NamedTuple):
    """Parts of a block that are kept or cut whole.

    Attributes:
      outputs: names of the modules in the block that write them. inputs: of those that read them.
      number: how many there are; None: each feature is one.
      keep: the share that is kept, at least one.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    number: int | None
    keep: float


class Kept(NamedTuple):
    """What is kept of one weight: positions of the canonical ``[*batch, n_in, n_out]``, ``[*batch, kept]`` ascending; None: all."""

    site: Site
    inputs: np.ndarray | None
    outputs: np.ndarray | None

    @property
    def small(self) -> Site:
        """The weight's site in the pruned model."""
        shape = list(self.site.shape)
        for axis, n, kept in (
            (self.site.inputs[0], self.site.n_in, self.inputs),
            (self.site.outputs[0], self.site.n_out, self.outputs),
        ):
            shape[axis] = shape[axis] if kept is None else shape[axis] * kept.shape[-1] // n
        return replace(self.site, shape=tuple(shape))


def heads(
    number: int,
    keep: float,
    outputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "query", "key", "value"),
    inputs: tuple[str, ...] = ("o_proj", "output"),
) -> Units:
    """The heads of an attention block.

    Args:
      number: of key/value heads. Where several query heads share one, they go with it, as a group.
      keep: the share that is kept.
    """
    return Units(outputs, inputs, number, keep)


def features(
    keep: float,
    outputs: tuple[str, ...] = ("gate_proj", "up_proj", "intermediate"),
    inputs: tuple[str, ...] = ("down_proj", "output"),
) -> Units:
    """The inner features of an MLP block, of which the share ``keep`` is kept."""
    return Units(outputs, inputs, None, keep)


def take(matrix: jax.Array, where: np.ndarray | None, axis: int) -> jax.Array:
    """Positions ``[*batch, kept]`` of the axis -2 or -1 of a matrix; None: all."""
    return matrix if where is None else jnp.take_along_axis(matrix, jnp.asarray(along(where, axis)), axis=axis)


def along(where: np.ndarray, axis: int) -> np.ndarray:
    """Numbers for each position of the axis -2 or -1, so that they meet those of a matrix."""
    return np.expand_dims(where, -3 - axis)
