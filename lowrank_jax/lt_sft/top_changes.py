"""The entries of many arrays that changed most, jointly and exactly as many as asked for, without sorting or gathering any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

_INFINITY = (
    0x7F800000  # the bits of float32's infinity; those of smaller positive numbers are ordered as the numbers are
)


class Change(NamedTuple):
    """A weight before and after, ``[...]``, and the entries that are chosen already (bool, of its shape), or None."""

    old: jax.Array
    new: jax.Array
    taken: jax.Array | None = None


def farthest(what: str, changes: Mapping[str, Change], number: int) -> dict[str, jax.Array]:
    """Where the ``number`` largest ``|new - old|`` are, over all weights together, beside those that are chosen already.

    The threshold is found by bisection on the bits of the distances, 31 passes over the weights: each one counts, and keeps nothing. Of
    equal distances the first are taken, in the order of the weights and of their entries.

    Args:
      what: the caller's name, for errors.

    Returns:
      ``{path: [...]}`` of bool.

    Raises:
      ValueError: more than there are, or a change that is not finite (by path).

    Example:
      >>> zeros = jnp.zeros(3)
      >>> found = farthest("example", {"x": Change(zeros, jnp.array([1.0, -4.0, 2.0])), "y": Change(zeros, zeros + 2)}, 3)
      >>> found["x"].tolist(), found["y"].tolist()
      ([False, True, True], [True, False, False])
    """
    for path, change in changes.items():
        if not bool(_finite(change)):
            raise ValueError(f"{what}: the change of {path} is not finite. Check the training before.")
    each = list(changes.values())
    at_least = lambda bits: sum(int(n) for n in _counts(each, jnp.int32(bits)))  # noqa: E731
    if number > at_least(0):
        raise ValueError(f"{what}(entries={number}): there are {at_least(0)} entries to choose from.")
    low, high = 0, _INFINITY  # `number` or more are at `low` or above it, and fewer at `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at_least(middle) >= number else (low, middle)
    left = number - at_least(low + 1)
    masks = {}
    for path, change in changes.items():
        masks[path], used = _choose(change, jnp.int32(low), jnp.int32(min(left, _INFINITY)))
        left -= int(used)
    return masks


def _distance(change: Change) -> jax.Array:
    return jnp.abs(jnp.asarray(change.new, jnp.float32) - jnp.asarray(change.old, jnp.float32))


def _bits(change: Change) -> jax.Array:
    """The distances as ordered whole numbers; -1: chosen already."""
    bits = jax.lax.bitcast_convert_type(_distance(change), jnp.int32)
    return bits if change.taken is None else jnp.where(change.taken, -1, bits)


@jax.jit
def _finite(change: Change) -> jax.Array:
    return jnp.isfinite(_distance(change)).all()


@jax.jit
def _counts(changes: list[Change], threshold: jax.Array) -> list[jax.Array]:
    # Weight by weight: all together can be more than an int32 counts.
    return [(_bits(change) >= threshold).sum(dtype=jnp.int32) for change in changes]


@jax.jit
def _choose(change: Change, threshold: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is above the threshold, the first ``left`` at it and what was chosen before; and how many were at it."""
    bits = _bits(change)
    ties = bits == threshold
    order = jnp.cumsum(ties.reshape(-1), dtype=jnp.int32).reshape(ties.shape)
    mask = (bits > threshold) | (ties & (order <= left))
    used = jnp.minimum(ties.sum(dtype=jnp.int32), left)
    return mask if change.taken is None else mask | change.taken, used
