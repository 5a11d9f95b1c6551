"""Homeostatic knowledge allotment: how much each branch of ViDA says of a batch."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters
from lowrank_jax.checks import check_choice
from lowrank_jax.methods.vida import SCALES


def vida_scales(
    uncertainty: jax.Array | float, threshold: float = 0.2, compat: Literal["paper", "official"] = "paper"
) -> tuple[jax.Array, jax.Array]:
    """The scales ``(low, high)`` of ViDA's branches for a batch whose uncertainty is known: ``1 - u, 1 + u`` or the other way round.

    ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation (arXiv 2306.04344). A model that is unsure sees a shift of
    the domain, which the wide branch is there to follow; one that is sure keeps to what domains share.

    Args:
      uncertainty: a scalar of the batch, at least 0. The release takes a tenth of the variance of the teacher's logits over ten
        augmentations of the batch, averaged over rows and classes.
      threshold: from which on the wide branch leads; the release takes 0.2 on ImageNet-C and 0.05 on CIFAR.
      compat: ``official``: the scale of the wide branch stays 1, as in the release, which sets one scale of a module that has both.

    Raises:
      ValueError: an unknown ``compat``.

    Example:
      >>> [round(float(scale), 2) for scale in vida_scales(0.3, threshold=0.2)]
      [0.7, 1.3]
    """
    check_choice("vida_scales", "compat", compat, ("paper", "official"))
    u = jnp.asarray(uncertainty, jnp.float32)
    lead = jnp.where(u >= threshold, u, -u)
    return 1 - lead, jnp.ones_like(u) if compat == "official" else 1 + lead


def with_vida_scales(adapters: Adapters, low: jax.Array | float, high: jax.Array | float) -> Adapters:
    """The same adapter with other scales at every site of `vida`; a new value, and safe under jit.

    Raises:
      ValueError: no site of `vida`.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.vida(rank=1, high_rank=2)}))
      >>> lr.with_vida_scales(adapters, *lr.vida_scales(0.3)).sites["layer/kernel"]["vida_scales"].round(2).tolist()
      [0.699999988079071, 1.2999999523162842]
    """
    pair = jnp.stack([jnp.asarray(low), jnp.asarray(high)])

    def of(name: str, leaf: Any) -> Any:
        # A part of a chain has its number in front of its leaves' names.
        return jnp.broadcast_to(pair, leaf.shape).astype(leaf.dtype) if name.rpartition(".")[2] == SCALES else leaf

    if not any(name.rpartition(".")[2] == SCALES for leaves in adapters.sites.values() for name in leaves):
        names = ", ".join(sorted({entry.method.name for entry in adapters.plan.entries}))
        raise ValueError(
            f"with_vida_scales: the plan has no site of vida (it has {names}). Only its branches have scales to set."
        )
    return adapters.replace(
        sites={path: {name: of(name, leaf) for name, leaf in leaves.items()} for path, leaves in adapters.sites.items()}
    )
