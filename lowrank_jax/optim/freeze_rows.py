"""LaMDA's gradual freezing as an optax transform: the updates of more and more rows become zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Order = Literal["descending", "ascending"]


class FreezeRowsState(NamedTuple):
    """Number of updates made so far, int32."""

    count: jax.Array  # type: ignore[assignment]


def frozen_rows(step: Any, rank: Any, freeze_steps: Any) -> jax.Array:
    """How many of ``rank`` rows are frozen at update ``step``: ``min(r, floor(r * step / freeze_steps))``, int32.

    Args:
      step: an int or an int32 array. rank: an int, or one for each element of a stack. freeze_steps: a number, which may be traced.

    Example:
      >>> [int(frozen_rows(step, 4, 8)) for step in (0, 1, 2, 7, 8, 99)]
      [0, 0, 1, 3, 4, 4]
    """
    ranks = np.maximum(np.asarray(rank), 1)
    # The step at which each row freezes, in float64 where the length of the run is known; the offset absorbs its rounding.
    at = np.arange(1, ranks.max() + 1) * freeze_steps / ranks[..., None]
    at = jnp.ceil(at - 1e-6) if isinstance(at, jax.Array) else np.ceil(at - 1e-6)
    done = (jnp.asarray(step)[..., None] >= at.astype(np.int32)).sum(axis=-1)
    return jnp.minimum(done, ranks).astype(jnp.int32)


def freeze_rows(
    leaf: str,
    freeze_steps: jax.Array | float,
    ranks: int | Sequence[int] | None = None,
    order: Order = "descending",
) -> optax.GradientTransformation:
    """Zeroes the updates of the first rows of one leaf, more of them as training goes on.

    LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation (arXiv 2406.12832). The updates are
    masked, not the gradients, so neither momentum nor weight decay moves a frozen row: chain it after the optimizer.

    Args:
      leaf: name of the leaf, ``[*batch, r, n_out]``, in a tree ``{path: {leaf: update}}``.
      freeze_steps: the update at which every row is frozen.
      ranks: the number of rows in use, one for all or one for each element of a stack; None: all rows.
      order: ``descending`` freezes row 0 (the largest singular value) first, ``ascending`` the last row first.

    Returns:
      An optax transform whose state is the update count.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), freeze_rows("b", freeze_steps=2))
      >>> params = {"site": {"b": jnp.zeros((2, 1))}}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"site": {"b": jnp.ones((2, 1))}}, state, params)
      >>> updates["site"]["b"].ravel().tolist()
      [0.0, -1.0]
    """

    def init(params: Any) -> FreezeRowsState:
        return FreezeRowsState(jnp.zeros((), jnp.int32))

    def update(updates: Mapping[str, Any], state: FreezeRowsState, params: Any = None) -> tuple[Any, FreezeRowsState]:
        def masked(name: str, u: Any) -> Any:
            if name != leaf or not hasattr(u, "shape"):
                return u
            total = u.shape[-2]
            used = np.asarray(total if ranks is None else ranks)
            used = used.reshape(u.shape[:-2]) if used.ndim else used
            frozen = frozen_rows(state.count, used, freeze_steps)[..., None]
            rows = jnp.arange(total)
            keep = rows >= frozen if order == "descending" else rows < used[..., None] - frozen
            return jnp.where(keep[..., None], u, jnp.zeros_like(u))

        new = {path: {name: masked(name, u) for name, u in leaves.items()} for path, leaves in updates.items()}
        return new, FreezeRowsState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
