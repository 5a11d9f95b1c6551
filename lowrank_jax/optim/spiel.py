"""SpIEL-MA as an optax transform: entries are exchanged inside the compiled step, by what SM3 knows of the whole weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.batching import over_batch
from lowrank_jax.optim.entry_swaps import Schedule, flat_positions, swap, swap_share, swapped_leaves
from lowrank_jax.optim.spiel_steps import has_sm3, sm3


class ReselectState(NamedTuple):
    """Number of updates made so far, int32."""

    count: jax.Array  # type: ignore[assignment]


def reselect_entries(
    total_steps: Any, every: int = 20, first: int = 5, share: float = 0.2, schedule: Schedule = "linear"
) -> optax.GradientTransformationExtraArgs:
    """Keeps SM3's accumulators and exchanges entries by them; where there are none, holds the positions still.

    The momentum approximation of Scaling Sparse Fine-Tuning to Large Language Models (SpIEL-MA, arXiv 2401.16405). With an entry's
    gradient g at row i and column j, ``nu = min(row_max[i], column_max[j]) + g^2``, and both accumulators become the largest ``nu`` they
    have seen. After updates ``first``, ``first + every`` and so on the share of `swap_share` of each layer's entries, those of smallest
    ``|v|``, give way to the inactive positions with the largest ``row_max[i] * column_max[j]``, at a value of zero.

    Chain it last: what an optimizer makes of positions is undone. A swap forms that product densely, one layer at a time. Of equal
    numbers the first comes first, in the order of the entries or of the flattened weight.

    Args:
      total_steps: length of the run; it may be traced. every, first, share, schedule: see above.

    Returns:
      An optax transform on ``{path: {"v" [*batch, k], "row" [*batch, k], "column" [*batch, k], "row_max" [*batch, n_in],
      "column_max" [*batch, n_out]}}``, the last two only where SM3 is; ``update`` takes the loss's ``gradients`` by name.

    Example:
      >>> leaves = {"v": jnp.ones(1), "row": jnp.zeros(1), "column": jnp.zeros(1), "row_max": jnp.zeros(2), "column_max": jnp.zeros(2)}
      >>> tx, still = reselect_entries(10, first=1), {"x": jax.tree.map(jnp.zeros_like, leaves)}
      >>> gradient = {"x": {**still["x"], "v": jnp.array([3.0])}}
      >>> updates, _ = tx.update(still, tx.init(still), {"x": leaves}, gradients=gradient)
      >>> new = optax.apply_updates({"x": leaves}, updates)["x"]
      >>> new["row_max"].tolist(), (new["row"].tolist(), new["column"].tolist()), new["v"].tolist()
      ([9.0, 0.0], ([0.0], [1.0]), [0.0])
    """

    def init(params: Any) -> ReselectState:
        return ReselectState(jnp.zeros((), jnp.int32))

    def update(
        updates: Mapping[str, Any], state: ReselectState, params: Any = None, *, gradients: Any, **extra: Any
    ) -> tuple[Any, ReselectState]:
        step = optax.safe_increment(state.count)
        due = (step >= first) & (step % every == first % every)
        part = swap_share(step, total_steps, first, share, schedule)

        def of(path: str, old: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            u, held = updates[path]["v"], {n: jnp.zeros_like(x) for n, x in old.items() if n != "v"}
            if not has_sm3(old):
                return {"v": u, **held}
            new = {**old, "v": optax.apply_updates(old["v"], u)}
            new |= _accumulated(old, gradients[path]["v"].astype(jnp.float32))
            new = jax.lax.cond(due, lambda x: _swapped_by_sm3(x, part), lambda x: x, new)
            moved = (new["row"] != old["row"]) | (new["column"] != old["column"])
            return {"v": jnp.where(moved, -old["v"].astype(u.dtype), u), **{n: new[n] - old[n] for n in held}}

        return {path: of(path, leaves) for path, leaves in params.items()}, ReselectState(step)

    return optax.GradientTransformationExtraArgs(init, update)


def _accumulated(leaves: Mapping[str, jax.Array], g: jax.Array) -> dict[str, jax.Array]:
    largest = over_batch(lambda old, at, nu: old.at[at].max(nu), g.ndim - 1)
    nu = sm3(leaves, g)
    return {f"{n}_max": largest(leaves[f"{n}_max"], leaves[n].astype(jnp.int32), nu) for n in ("row", "column")}


def _swapped_by_sm3(leaves: Mapping[str, jax.Array], share: jax.Array) -> dict[str, jax.Array]:
    def of_layer(x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        n_in, n_out = len(x["row_max"]), len(x["column_max"])
        here = flat_positions(x["row"], x["column"], (n_in, n_out))
        number = min(len(here), n_in * n_out - len(here))
        if not number:
            return x
        # Roots, because the product of two squared gradients can be too small for float32; the order is the same.
        guess = jnp.outer(jnp.sqrt(x["row_max"]), jnp.sqrt(x["column_max"])).reshape(-1).at[here].set(-1)
        scores, candidates = jax.lax.top_k(guess, number)
        done = swap(x["v"], here, candidates, scores, share, n_in * n_out)
        return {**x, **swapped_leaves(x["v"], done, n_out)}

    batch = leaves["v"].shape[:-1]
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in leaves.items()}
    # A loop, so that one dense product is there at a time.
    return {name: x.reshape(*batch, x.shape[-1]) for name, x in jax.lax.map(of_layer, flat).items()}
