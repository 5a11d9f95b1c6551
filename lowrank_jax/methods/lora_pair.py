"""What the methods made of LoRAs have in common: a trained pair of factors ``a [n_in, r]``, ``b [r, n_out]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, random_a
from lowrank_jax.methods.ranks import Rank, largest, layer_ranks, used
from lowrank_jax.sites import Site


def pair_leaves(name: str, rank: Rank, site: Site, prefix: str = "") -> dict[str, Leaf]:
    """The descriptions of both factors, trained; a ValueError of the method ``name`` where the rank does not fit."""
    r, total = largest(rank), int(layer_ranks(name, rank, site).sum())
    a, b = a_leaf(site, r, count=total * site.n_in), b_leaf(site, r, count=total * site.n_out)
    return {f"{prefix}a": a, f"{prefix}b": b}


def zero_b(key: jax.Array, site: Site, rank: Rank, init: str, prefix: str = "") -> Leaves:
    """A random ``a`` (see `random_a`) and ``b = 0``; directions beyond a layer's own rank are zero in both."""
    r = largest(rank)
    a = random_a(key, (*site.batch_shape, site.n_in, r), init) * used(site, rank)[..., None, :]
    return {f"{prefix}a": a, f"{prefix}b": jnp.zeros((*site.batch_shape, r, site.n_out))}


def anchored_pair(
    name: str,
    rank: int,
    scale: float,
    start: Callable[[jax.Array, Site, Given], tuple[jax.Array, jax.Array]],
    needs: frozenset[str],
    *,
    dropout: float = 0.0,
    kinds: frozenset[str] | None = None,
    check: Callable[[Site], None] | None = None,
) -> Method:
    """A LoRA that starts anywhere: its first factors are a frozen anchor, so that the output starts at the base's, to rounding.

    Args:
      start: ``(key, site, given) -> a, b``. check: raises where the site does not fit; None: the rank has to fit the weight.
    """

    def leaves(site: Site) -> dict[str, Leaf]:
        if check is not None:
            check(site)
        trained = pair_leaves(name, rank, site)
        return trained | {f"{n}0": leaf._replace(trains=None, anchor=True) for n, leaf in trained.items()}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a, b = start(key, site, given)
        return {"a": a, "b": b, "a0": a, "b0": b}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        a, b = leaves["a"], leaves["b"]
        if "a0" in leaves:
            a = jnp.concatenate([a, leaves["a0"]], axis=-1)
            b = jnp.concatenate([b, -leaves["b0"]], axis=-2)
        return LowRank(a, b, scale=scale, dropout=dropout)

    def anchor(site: Site, leaves: Mapping[str, jax.Array]) -> LowRank:
        return LowRank(leaves["a0"], leaves["b0"], scale=scale)

    return Method(LowRank, leaves, init, expand, anchor=anchor, exact_init=False, needs=needs, kinds=kinds)
