"""From what single modules have to the leaves of one adapted weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.forms import leaf_sharding
from lowrank_jax.methods.base import scaling
from lowrank_jax.methods.dora import dora
from lowrank_jax.methods.full import full
from lowrank_jax.methods.lora import lora
from lowrank_jax.peft.fields import alpha_for
from lowrank_jax.peft.tensors import within_rank
from lowrank_jax.peft.units import stack
from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site, mesh_of


class Element(NamedTuple):
    """One module's LoRA: ``a [n_in, r]``, ``b [r, n_out]``, its alpha, and for DoRA the columns' lengths ``[n_out]``."""

    a: np.ndarray
    b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None


def assemble_lora(
    site: Site, elements: Mapping[int, Element], rank_stabilised: bool, dropout: float
) -> tuple[Entry, dict[str, np.ndarray]]:
    """One `lora`, or `dora`, for a weight, from those of the elements of its stack that have one.

    Args:
      elements: by number, element 0 where the weight is no stack.

    Returns:
      The plan's entry and its leaves ``a [*batch, n_in, r]``, ``b [*batch, r, n_out]`` and, for DoRA, ``magnitude [*batch, n_out]``.
    """
    scales = {i: scaling(e.a.shape[1], e.alpha, rank_stabilised) for i, e in elements.items()}
    rank = min(site.max_rank, max(e.a.shape[1] for e in elements.values()))
    first = next(iter(elements.values()))
    make = lora if first.magnitude is None else dora
    uniform = len(set(scales.values())) == 1
    if uniform and scaling(rank, first.alpha, rank_stabilised) == next(iter(scales.values())):
        method = make(rank=rank, alpha=first.alpha, rank_stabilised=rank_stabilised, dropout=dropout)
    else:
        alpha = alpha_for(next(iter(scales.values())), rank) if uniform else rank
        method = make(rank=rank, alpha=alpha, dropout=dropout)
    found = {}
    for i, element in elements.items():
        a, b = within_rank(site, element.a, element.b)
        b = b if uniform else b.astype(np.float32) * np.float32(scales[i])
        missing = rank - a.shape[1]
        found[i] = {"a": np.pad(a, ((0, 0), (0, missing))), "b": np.pad(b, ((0, missing), (0, 0)))}
        if element.magnitude is not None:
            found[i]["magnitude"] = element.magnitude
    layers, leaves = stack(site, found)
    return Entry(site, method, layers), leaves


def assemble_full(site: Site, weight: np.ndarray) -> tuple[Entry, dict[str, np.ndarray]]:
    """A `full` for a weight that stands in the file as a whole."""
    return Entry(site, full()), {"weight": weight}


def place(entry: Entry, leaves: Mapping[str, np.ndarray], weight: Any, dtype: Any) -> dict[str, jax.Array]:
    """The leaves on the devices, laid out beside their weight where that is sharded."""
    where = {name: leaf_sharding(entry.leaves[name], entry.local, mesh_of(weight)) for name in leaves}
    return {name: _put(value, where[name], weight, dtype) for name, value in leaves.items()}


def place_common(leaves: Mapping[str, np.ndarray], weight: Any, dtype: Any) -> dict[str, jax.Array]:
    """Leaves that all sites share, on every device that has a part of the base."""
    return {name: _put(value, None, weight, dtype) for name, value in leaves.items()}


def _put(value: np.ndarray, where: NamedSharding | None, weight: Any, dtype: Any) -> jax.Array:
    # A copy: the array may be a view of the mapped file.
    array = np.array(value, jnp.dtype(value.dtype if dtype is None else dtype), order="C")
    mesh = mesh_of(weight)
    return jnp.asarray(array) if mesh is None else jax.device_put(array, where or NamedSharding(mesh, PartitionSpec()))  # type: ignore[arg-type]
