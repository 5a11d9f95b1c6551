"""LoRAs laid out alike, so that different ones are one program's input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.convert.conversion import check_plain, placed
from lowrank_jax.convert.factors import Factors, stacked, trimmed
from lowrank_jax.convert.updates import numbers, same_weight, update_of
from lowrank_jax.methods.base import scaling
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.ranks import largest, layer_ranks
from lowrank_jax.plan import Entry, Plan


def pad(adapters: Adapters, like: int | Plan, dtype: Any = None) -> Adapters:
    """LoRAs laid out in a common plan, padded with zeros, so that they can be stacked for rows or swapped without compiling again.

    They act as before. Scales are multiplied into ``b`` where they differ from the plan's, so alpha and rank may differ.

    Args:
      adapters: all its methods are `lora`, see `to_lora`.
      like: a rank for every site (cut to the weight's smaller dimension where that is less), with alpha = rank; or the plan of another
        LoRA: a site that this adapter does not have gets zeros.
      dtype: storage dtype; None keeps the adapter's. Multiplying a scale into ``b`` is exact in float32 to rounding, and exact in any
        dtype where the scales differ by a power of two.

    Raises:
      ValueError: a method other than `lora`, a site or layer the plan does not have, a rank above the plan's; names the site.

    Example:
      >>> import jax.numpy as jnp, lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((8, 6))}}
      >>> make = lambda **how: lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(**how)}))
      >>> one, two = lr.pad(make(rank=2, alpha=8), 4), lr.pad(make(rank=3), 4)
      >>> one.plan == two.plan, lr.stack([one, two]).sites["layer/kernel"]["a"].shape
      (True, (2, 8, 4))
    """
    check_plain("pad", adapters)
    plan = like if isinstance(like, Plan) else _padded(adapters.plan, like)
    for entry in (*adapters.plan.entries, *plan.entries):
        if entry.method.name != "lora":
            raise ValueError(
                f"pad: {entry.site.path} has the method {entry.method.name}; convert it with lowrank_jax.to_lora."
            )
    for path in sorted(adapters.plan.by_path.keys() - plan.by_path.keys()):
        raise ValueError(f"pad: {path} has no place in the plan; its sites are {', '.join(plan.by_path)}.")
    first = next(iter(jax.tree.leaves(adapters)))
    sites = {}
    for entry in plan.entries:
        path = entry.site.path
        own = adapters.sites.get(path, {"a": first, "b": first})
        if adapters.plan.by_path.get(path) == entry:
            sites[path] = {name: x.astype(dtype or x.dtype) for name, x in own.items()}
        else:
            leaves = {name: x.astype(dtype or own[name].dtype) for name, x in _laid_out(adapters, entry).items()}
            sites[path] = placed(entry, leaves, first)
    return Adapters(sites, {}, plan)


def _padded(plan: Plan, rank: int) -> Plan:
    if rank < 1:
        raise ValueError(f"pad: rank={rank}: expected a rank of at least 1.")
    return replace(
        plan,
        entries=tuple(replace(e, method=lora(rank=min(rank, e.site.max_rank))) for e in plan.entries),
    )


def _laid_out(adapters: Adapters, entry: Entry) -> dict[str, np.ndarray]:
    """An adapter's leaves where another plan's entry has them."""
    path, config = entry.site.path, dict(entry.method.config)
    rooms = dict(zip(numbers(entry), layer_ranks("lora", config["rank"], entry.local), strict=True))
    empty = Factors(np.zeros((entry.site.n_in, 0), np.float32), np.zeros((0, entry.site.n_out), np.float32))
    parts = dict.fromkeys(rooms, empty)
    own = adapters.plan.by_path.get(path)
    if own is not None:
        if not same_weight(own.site, entry.site):
            raise ValueError(f"pad: {path} is another weight in the plan: {entry.site} is not {own.site}.")
        update = update_of(adapters, path, None)
        assert update.factors is not None
        scale = update.factors.scale / scaling(largest(config["rank"]), config["alpha"], config["rank_stabilised"])
        for number in update.numbers:
            part = trimmed(update.at(number)._replace(scale=scale))  # type: ignore[union-attr]
            if part.rank > rooms.get(number, 0):
                raise ValueError(
                    f"pad: {path} has rank {part.rank}, the plan has room for {rooms.get(number, 0)} (matrix {number} of its stack)."
                )
            parts[number] = part
    return stacked(list(parts.values()), entry.local.batch_shape, largest(config["rank"]))
