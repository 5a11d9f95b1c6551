"""A finished sparse update: what is left of SaRA after training."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lowrank_jax.forms import Leaf, Sparse
from lowrank_jax.methods.base import Context, Given, Leaves, Method, method
from lowrank_jax.sites import Site


@method
def sparse_update(entries: int) -> Method:
    """What `lowrank_jax.compact` makes of `sara` or `spiel`: ``values [entries]`` added at ``indices [entries]`` int32; nothing to train.

    Args:
      entries: at each layer of a site.

    Example:
      >>> sparse_update(entries=8).name
      'sparse_update'
    """
    if entries < 1:
        raise ValueError(f"sparse_update(entries={entries}): expected at least one.")

    def leaves(site: Site) -> dict[str, Leaf]:
        shape = (entries,)
        return {"indices": Leaf(shape, ("",), trains=None, dtype=jnp.int32), "values": Leaf(shape, ("",), trains=None)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        shape = (*site.batch_shape, entries)
        return {"indices": jnp.zeros(shape, jnp.int32), "values": jnp.zeros(shape)}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Sparse:
        return Sparse(leaves["indices"], leaves["values"], shape=(site.n_in, site.n_out))

    return Method(Sparse, leaves, init, expand)
