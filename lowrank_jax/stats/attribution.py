"""How much of the change between two models goes through each weight: integrated gradients along the line between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters
from lowrank_jax.plan import Plan
from lowrank_jax.sites import Site, flatten, with_leaves
from lowrank_jax.stats.collect import Loss, shown
from lowrank_jax.stats.statistics import Statistics, check_finite, fingerprint


def contributions(
    loss: Loss,
    params: Any,
    tuned: Any,
    where: Plan | Mapping[str, Site],
    batches: Iterable[Any],
    *,
    steps: int = 8,
    progress: bool = True,
) -> Statistics:
    """How much each weight contributes to the change of the loss from a base to a tuned model, for CoLoRA.

    Each entry's integrated gradient, see `attribute`, in absolute value, summed over the entries of a weight and averaged over batches: the
    filter attribution that CoLoRA (arXiv 2408.01099) builds on ("Finding Discriminative Filters for Specific Degradations in Blind
    Super-Resolution", arXiv 2108.01070), with its filters taken for whole weights. In units of the loss.

    Args:
      loss, batches, progress: as for `lowrank_jax.collect`. params: the base. tuned: the same model after full fine-tuning on the task.
      where: the weights to attribute to. steps: how many points of the line are looked at for each batch.

    Returns:
      Statistics of kind ``contribution``, ``[*batch]`` for each weight.

    Raises:
      ValueError: no batches, ``steps`` below 1, a tuned model that is another model or equals the base, values that are not finite.

    Example:
      >>> import lowrank_jax as lr
      >>> params, tuned = ({"a": {"kernel": jnp.eye(2)}, "b": {"kernel": s * jnp.eye(2)}} for s in (1, 3))
      >>> loss = lambda params, adapters, batch: (params["b"]["kernel"] ** 2).sum()
      >>> found = contributions(loss, params, tuned, lr.sites(params), [None], progress=False)
      >>> {path: float(value) for path, value in found.values["contribution"].items()}
      {'a/kernel': 0.0, 'b/kernel': 16.0}
    """
    if steps < 1:
        raise ValueError(f"contributions(steps={steps}): expected at least 1.")
    sites = {e.site.path: e.site for e in where.entries} if isinstance(where, Plan) else dict(where)
    flat, goal = flatten(params), flatten(tuned)
    for path in flat:
        if path not in goal or goal[path].shape != flat[path].shape:
            got = f"has shape {goal[path].shape}" if path in goal else "is missing"
            raise ValueError(
                f"contributions: {path} {got} in the tuned model, the base's has shape {flat[path].shape}."
            )

    @jax.jit
    def of_batch(params: Any, tuned: Any, batch: Any) -> dict[str, jax.Array]:
        found = attribute(loss, params, tuned, batch, tuple(sites), steps)
        return {path: jnp.abs(site.canonical(found[path])).sum((-2, -1)) for path, site in sites.items()}

    total, count = None, 0
    for batch in shown(batches) if progress else batches:
        one = of_batch(params, tuned, batch)
        total, count = one if total is None else jax.tree.map(jnp.add, total, one), count + 1
    if total is None:
        raise ValueError("contributions: there are no batches; pass at least one.")
    values = {"contribution": {path: value / count for path, value in total.items()}}
    check_finite(values)
    if not any(bool(value.any()) for value in total.values()):
        raise ValueError(
            "contributions: no weight contributes; the tuned model equals the base wherever the loss looks."
        )
    return Statistics(values, {path: fingerprint(flat[path]) for path in sites}, count)


def attribute(
    loss: Loss, params: Any, tuned: Any, batch: Any, paths: tuple[str, ...], steps: int
) -> dict[str, jax.Array]:
    """The integrated gradient of every entry of some weights, ``(tuned - base) * mean dL/dw``, along the line from a base to a tuned model.

    The mean is taken at the midpoints of ``steps`` equal pieces of it. Over all entries of all weights that differ the sum is the change
    of the loss, to ``O(1/steps^2)``; for a loss quadratic in the weights, exactly.

    Returns:
      ``{path: array}`` float32, in the weights' own shapes. May run under jit.
    """
    none = Adapters({}, {}, Plan(()))
    flat, goal = flatten(params), flatten(tuned)
    moving = [path for path, w in flat.items() if jnp.issubdtype(w.dtype, jnp.floating)]
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731

    def add(n: jax.Array, total: dict[str, jax.Array]) -> dict[str, jax.Array]:
        fraction = (n + 0.5) / steps
        point = {p: (wide(flat[p]) + fraction * (wide(goal[p]) - wide(flat[p]))).astype(flat[p].dtype) for p in moving}
        slope = jax.grad(lambda own: loss(with_leaves(params, {**point, **own}), none, batch))(
            {p: point[p] for p in paths}
        )
        return jax.tree.map(lambda x, g: x + wide(g) / steps, total, slope)

    mean = jax.lax.fori_loop(0, steps, add, {path: jnp.zeros(flat[path].shape, jnp.float32) for path in paths})
    return {path: (wide(goal[path]) - wide(flat[path])) * mean[path] for path in paths}
