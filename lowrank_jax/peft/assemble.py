"""From the LoRAs of single modules to the leaves of one adapted weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.forms import leaf_spec
from lowrank_jax.methods.base import scaling
from lowrank_jax.methods.full import full
from lowrank_jax.methods.lora import lora
from lowrank_jax.peft.config import alpha_for
from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site


class Element(NamedTuple):
    """One module's LoRA: ``a [n_in, r]``, ``b [r, n_out]``, and its alpha."""

    a: np.ndarray
    b: np.ndarray
    alpha: float


def assemble_lora(
    site: Site, elements: Mapping[int, Element], rank_stabilised: bool, dropout: float
) -> tuple[Entry, dict[str, np.ndarray]]:
    """One `lora` for a weight, from those of the elements of its stack that have one.

    Args:
      elements: by number, element 0 where the weight is no stack.

    Returns:
      The plan's entry and its leaves ``a [*batch, n_in, r]``, ``b [*batch, r, n_out]``.
    """
    scales = {i: scaling(e.a.shape[1], e.alpha, rank_stabilised) for i, e in elements.items()}
    elements = {i: _within(site, e) for i, e in elements.items()}
    rank = max(e.a.shape[1] for e in elements.values())
    first = next(iter(elements.values()))
    uniform = len(set(scales.values())) == 1
    if uniform and scaling(rank, first.alpha, rank_stabilised) == next(iter(scales.values())):
        method = lora(rank=rank, alpha=first.alpha, rank_stabilised=rank_stabilised, dropout=dropout)
    else:
        method = lora(
            rank=rank, alpha=alpha_for(next(iter(scales.values())), rank) if uniform else rank, dropout=dropout
        )

    inner = math.prod(site.batch_shape[1:])
    layers = sorted({i // inner for i in elements}) if site.batch else [0]
    dtype = functools.reduce(jnp.promote_types, (factor.dtype for e in elements.values() for factor in (e.a, e.b)))
    a = np.zeros((len(layers), inner, site.n_in, rank), dtype)
    b = np.zeros((len(layers), inner, rank, site.n_out), dtype)
    for i, element in elements.items():
        row, r = (layers.index(i // inner), i % inner), element.a.shape[1]
        a[row][:, :r] = element.a
        b[row][:r] = element.b if uniform else element.b.astype(np.float32) * np.float32(scales[i])
    complete = not site.batch or len(layers) == site.batch_shape[0]
    entry = Entry(site, method, None if complete else tuple(layers))
    batch = entry.local.batch_shape
    return entry, {"a": a.reshape(*batch, site.n_in, rank), "b": b.reshape(*batch, rank, site.n_out)}


def assemble_full(site: Site, weight: np.ndarray) -> tuple[Entry, dict[str, np.ndarray]]:
    """A `full` for a weight that stands in the file as a whole."""
    return Entry(site, full()), {"weight": weight}


def place(entry: Entry, leaves: Mapping[str, np.ndarray], weight: Any, dtype: Any) -> dict[str, jax.Array]:
    """The leaves on the devices, laid out beside their weight where that is sharded."""
    placed = {}
    for name, value in leaves.items():
        # A copy: the array may be a view of the mapped file.
        array = np.array(value, jnp.dtype(value.dtype if dtype is None else dtype), order="C")
        sharding = getattr(weight, "sharding", None)
        if isinstance(sharding, NamedSharding):
            spec = leaf_spec(entry.leaves[name], entry.local) or PartitionSpec()
            placed[name] = jax.device_put(array, NamedSharding(sharding.mesh, spec))
        else:
            placed[name] = jnp.asarray(array)
    return placed


def _within(site: Site, element: Element) -> Element:
    """The same update at a rank that the weight can have: above it, one factor is multiplied out."""
    if element.a.shape[1] <= site.max_rank:
        return element
    dtype = jnp.promote_types(element.a.dtype, element.b.dtype)
    update = (element.a.astype(np.float32) @ element.b.astype(np.float32)).astype(dtype)
    if site.n_out <= site.n_in:
        return element._replace(a=update, b=np.eye(site.n_out, dtype=dtype))
    return element._replace(a=np.eye(site.n_in, dtype=dtype), b=update)
