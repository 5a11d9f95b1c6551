"""Ranks that may differ within a stack of layers: checks, padding, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.methods.base import check_rank
from lowrank_jax.sites import Site

Rank = int | tuple[int, ...]


def largest(rank: Rank) -> int:
    """The rank that a stack is padded to."""
    return max(rank) if isinstance(rank, tuple) else rank


def layer_ranks(name: str, rank: Rank, site: Site) -> np.ndarray:
    """The rank of every element of a site's stack, ``[layers]`` int64; one element where there is no stack.

    Raises:
      ValueError: a rank that does not fit the site, or a tuple of another length than the stack.
    """
    layers = math.prod(site.batch_shape)
    if isinstance(rank, tuple) and len(rank) != layers:
        raise ValueError(f"{name} at {site.path}: {len(rank)} ranks for a stack of {layers}; give one rank for each.")
    each = np.full(layers, rank) if isinstance(rank, int) else np.asarray(rank)
    for one in {int(each.min()), int(each.max())}:
        check_rank(name, one, site)
    return each


def used(site: Site, rank: Rank) -> jax.Array:
    """1 for the directions in use and 0 for padding, ``[*batch, r]`` float32."""
    each = np.full(site.batch_shape, rank) if isinstance(rank, int) else np.reshape(rank, site.batch_shape)
    return jnp.asarray(np.arange(largest(rank)) < each[..., None], jnp.float32)


def of_stack(ranks: Sequence[int], site: Site) -> Rank:
    """The ``rank`` field for a site: a tuple for a stack, a number otherwise."""
    return tuple(map(int, ranks)) if site.batch_shape else int(ranks[0])
