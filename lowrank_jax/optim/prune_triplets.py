"""AdaLoRA's pruning as an optax transform: the least important directions of all weights together are set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax.optim.budget import cubic_budget, keep_best
from lowrank_jax.optim.importance import Importance, score, smooth, zero_importance

Budget = Literal["rank", "parameters"]


class PruneTripletsState(NamedTuple):
    """Number of updates made so far, int32, and the importance of every number of every triplet, float32."""

    count: jax.Array  # type: ignore[assignment]
    importance: Importance


def prune_triplets(
    target: int,
    start: Any,
    stop: Any,
    interval: int = 1,
    budget: Budget = "rank",
    betas: tuple[float, float] = (0.85, 0.85),
) -> optax.GradientTransformationExtraArgs:
    """Sets ``e`` to zero where a triplet ``(a[:, j], e[j], b[j])`` is not among the best that a falling budget pays for.

    AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512). The sensitivity of a number is
    ``|w * dL/dw|``; a triplet scores the smoothed importance of ``e[j]`` plus the means of those of ``a[:, j]`` and ``b[j]``. The
    triplets of all sites and layers compete. ``a`` and ``b`` of a pruned one are kept and go on learning, so it can come back;
    ``e`` is exactly zero, whatever momentum and weight decay made of its update: chain it after the optimizer.

    Args:
      target: the mean rank of a weight at the end, which defines the final budget.
      start, stop: the updates at which the budget begins to fall and at which it is reached (scores are frozen from then on);
        they may be traced.
      interval: updates between two prunings before ``stop``; afterwards every update prunes.
      budget: what is held: ``rank``: the number of triplets, exactly; ``parameters``: the numbers in ``a`` and ``b`` of those kept, never
        exceeded.
      betas: smoothing of the sensitivity and of its spread.

    Returns:
      An optax transform on ``{path: {"a" [*batch, n_in, r], "e" [*batch, r], "b" [*batch, r, n_out]}}``; ``update`` takes the
      loss's ``gradients`` by name.

    Example:
      >>> params = {"x": {"a": jnp.ones((2, 2)), "e": jnp.array([1.0, 2.0]), "b": jnp.ones((2, 3))}}
      >>> tx = prune_triplets(target=1, start=0, stop=2)
      >>> updates = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(updates, tx.init(params), params, gradients=jax.tree.map(jnp.ones_like, params))
      >>> optax.apply_updates(params, updates)["x"]["e"].tolist()
      [0.0, 2.0]
    """

    def init(params: Any) -> PruneTripletsState:
        return PruneTripletsState(jnp.zeros((), jnp.int32), zero_importance(params))

    def update(
        updates: Mapping[str, Any], state: PruneTripletsState, params: Any = None, *, gradients: Any, **extra: Any
    ) -> tuple[Any, PruneTripletsState]:
        step = optax.safe_increment(state.count)
        sensitivity = jax.tree.map(
            lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), params, gradients
        )
        now = smooth(state.importance, sensitivity, betas)
        now = jax.tree.map(lambda new, old: jnp.where(step < stop, new, old), now, state.importance)
        scores = {p: s["e"] + s["a"].mean(-2) + s["b"].mean(-1) for p, s in score(now).items()}
        sizes = {p: leaves["a"].shape[-2] + leaves["b"].shape[-1] for p, leaves in params.items()}
        unit = int(np.gcd.reduce(list(sizes.values())))
        costs = {p: 1 if budget == "rank" else size // unit for p, size in sizes.items()}
        first = sum(costs[p] * s.size for p, s in scores.items())
        last = sum(costs[p] * (s.size // s.shape[-1]) * target for p, s in scores.items())
        kept = keep_best(scores, costs, cubic_budget(step, start, stop, first, last))
        prunes = (step > start) & ((step >= stop) | (step % interval == 0))

        def masked(path: str) -> Any:
            own = updates[path]
            return {**own, "e": jnp.where(prunes & ~kept[path], -params[path]["e"], own["e"])}

        return {path: masked(path) for path in updates}, PruneTripletsState(step, now)

    return optax.GradientTransformationExtraArgs(init, update)
