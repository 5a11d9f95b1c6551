"""Which entries of a sparse update give way to which others: how many, and one for one."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice

Schedule = Literal["linear", "cosine"]


class Swap(NamedTuple):
    """What becomes of ``k`` entries: whether each leaves, where it is afterwards, and which candidate took its place."""

    leaves: jax.Array
    positions: jax.Array
    source: jax.Array


def flat_positions(row: jax.Array, column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Positions in the flattened weight, int32, of rows and columns that are held as whole float32 numbers.

    Example:
      >>> flat_positions(jnp.array([0.0, 2.0]), jnp.array([1.0, 3.0]), (3, 4)).tolist()
      [1, 11]
    """
    # Clipped, because averaging or perturbing an adapter's leaves must not move an update out of the weight.
    i, j = (jnp.clip(x.astype(jnp.int32), 0, n - 1) for x, n in zip((row, column), shape, strict=True))
    return i * shape[1] + j


def swap_share(step: Any, total_steps: Any, first: int, share: float = 0.2, schedule: Schedule = "linear") -> jax.Array:
    """The share of a weight's entries that are exchanged after update ``step`` (1, 2, ...), float32.

    ``linear``: ``share * (1 - step / total_steps)``, and all of them up to update ``first``, so that no random position stays by chance.
    ``cosine``: ``share * (1 + cos(pi * step / total_steps)) / 2`` from the start. Both end at nothing.

    Raises:
      ValueError: an unknown schedule.

    Example:
      >>> [round(float(swap_share(step, 100, first=5)), 3) for step in (5, 25, 100)]
      [1.0, 0.15, 0.0]
    """
    check_choice("swap_share", "schedule", schedule, get_args(Schedule))
    way = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0, 1)
    if schedule == "cosine":
        return share * (1 + jnp.cos(math.pi * way)) / 2
    return jnp.where(jnp.asarray(step) <= first, 1.0, share * (1 - way))


def swap(values: jax.Array, here: jax.Array, candidates: jax.Array, scores: jax.Array, share: Any, size: int) -> Swap:
    """Exchanges a share of the entries of one matrix, the smallest, for the candidates of the highest score.

    Candidates that are active and stay are passed over. An entry that is to leave and to come stays where it is. Of equal numbers the
    first comes first.

    Args:
      values: ``[k]``. here: ``[k]`` int32, their positions, all different. candidates: ``[c]`` int32, all different; scores: ``[c]``.
      share: of the k entries, which may be traced; at most c of them. size: of the matrix; a bool for each of its entries is held.

    Example:
      >>> one = swap(jnp.array([3.0, 1.0, 2.0]), jnp.array([0, 4, 8]), jnp.array([8, 0, 5]), jnp.array([9.0, 8.0, 7.0]), 2 / 3, size=9)
      >>> one.positions.tolist(), one.leaves.tolist(), one.source[1].tolist()
      ([0, 5, 8], [False, True, False], 2)
    """
    k, c = len(values), len(candidates)
    # The factor absorbs the rounding of float32, so that a whole number is not truncated to the one below.
    number = jnp.minimum(jnp.floor(share * k * (1 + 5e-7)).astype(jnp.int32), min(k, c))
    outgoing = _rank(jnp.abs(values)) < number
    among = lambda x, some, which: jnp.zeros(size, bool).at[jnp.where(which, some, size)].set(True, mode="drop")[x]  # noqa: E731
    valid = ~among(candidates, here, ~outgoing)
    incoming = valid & (_rank(jnp.where(valid, -scores, jnp.inf)) < number)
    leaves = outgoing & ~among(here, candidates, incoming)
    enters = incoming & ~among(candidates, here, outgoing)
    # As many enter as leave; the n-th that enters takes the slot of the n-th that leaves.
    nth = jnp.where(enters, jnp.cumsum(enters) - 1, c)
    newcomers = jnp.zeros(c, jnp.int32).at[nth].set(jnp.arange(c, dtype=jnp.int32), mode="drop")
    source = newcomers[jnp.clip(jnp.cumsum(leaves) - 1, 0, c - 1)]
    return Swap(leaves, jnp.where(leaves, candidates[source], here), source)


def swapped_leaves(v: jax.Array, done: Swap, n_out: int) -> dict[str, jax.Array]:
    """The leaves ``v``, ``row`` and ``column`` after a swap: a newcomer's value is zero."""
    row, column = (x.astype(jnp.float32) for x in (done.positions // n_out, done.positions % n_out))
    return {"v": jnp.where(done.leaves, jnp.zeros_like(v), v), "row": row, "column": column}


def _rank(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, jnp.int32).at[jnp.argsort(x, stable=True)].set(jnp.arange(len(x), dtype=jnp.int32))
