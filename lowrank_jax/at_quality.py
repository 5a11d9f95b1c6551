"""Fixing what an adapter asks of every image, so that it can be merged."""

from __future__ import annotations

from dataclasses import replace

from lowrank_jax.adapters import Adapters
from lowrank_jax.methods.base import build


def at_quality(adapters: Adapters, quality: float | None) -> Adapters:
    """The same adapter as it acts on images of one quality, at every site of `petalface`; it merges and takes no signal.

    Only the plan changes: the leaves stay, and another quality can be chosen later.

    Args:
      quality: None: each image's own again (without the dropout that it may have been trained with).

    Raises:
      ValueError: no site of `petalface`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.petalface(rank=2)}))
      >>> lr.merge(params, lr.at_quality(adapters, 0.8))["layer"]["kernel"].shape
      (4, 3)
    """
    names = {entry.method.name for entry in adapters.plan.entries}
    if "petalface" not in names:
        raise ValueError(f"at_quality: the plan has no site of petalface (it has {', '.join(sorted(names))}).")
    entries = tuple(
        replace(e, method=build("petalface", {**dict(e.method.config), "quality": quality, "dropout": 0.0}))
        if e.method.name == "petalface"
        else e
        for e in adapters.plan.entries
    )
    return adapters.replace(plan=replace(adapters.plan, entries=entries))
