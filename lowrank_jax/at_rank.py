"""Choosing the rank of an adapter that was trained for all of them."""

from __future__ import annotations

from dataclasses import replace

from lowrank_jax.adapters import Adapters
from lowrank_jax.methods.base import build


def at_rank(adapters: Adapters, rank: int | None) -> Adapters:
    """The same adapter acting with its leading ``rank`` directions, at every site that `dylora` adapts.

    Only the plan changes: no direction is lost, and another rank can be chosen later. `compact` cuts the rest away.

    Args:
      rank: None: all of them.

    Raises:
      ValueError: no site of `dylora`, or a rank above what it was trained for.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.dylora(rank=3)}))
      >>> [lr.compact(lr.at_rank(adapters, r)).plan.trainable for r in (1, 2, 3)]
      [7, 14, 21]
    """
    names = {entry.method.name for entry in adapters.plan.entries}
    if "dylora" not in names:
        raise ValueError(
            f"at_rank: the plan has no site of dylora (it has {', '.join(sorted(names))}). Train with dylora to choose a rank later."
        )
    entries = tuple(
        replace(e, method=build("dylora", {**dict(e.method.config), "at": rank})) if e.method.name == "dylora" else e
        for e in adapters.plan.entries
    )
    return adapters.replace(plan=replace(adapters.plan, entries=entries))
