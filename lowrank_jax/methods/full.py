"""Full fine-tuning: the baseline, and how heads, norms and biases are trained beside adapters."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from lowrank_jax.forms import Dense, Leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, method
from lowrank_jax.sites import Site


@method
def full() -> Method:
    """Trains a full copy of the weight.

    ``weight [*batch, n_in, n_out]`` starts as the base's and takes its place; the base itself stays as it was. The only
    method that applies to every parameter, biases and norms included. Count: the size of the weight.

    Example:
      >>> import lowrank_jax as lr, jax.numpy as jnp
      >>> plan = lr.plan({"head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}}, {"head": lr.full()})
      >>> plan.trainable
      10
    """

    def leaves(site: Site) -> dict[str, Leaf]:
        if site.kind == "param":
            return {"weight": Leaf(site.shape, ("",) * len(site.shape))}
        return {"weight": Leaf((site.n_in, site.n_out), ("in", "out"))}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        kernel = given.need("kernel")
        return {"weight": kernel}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Dense:
        return Dense(leaves["weight"])

    return Method(Dense, leaves, init, expand, needs=frozenset({"kernel"}))
