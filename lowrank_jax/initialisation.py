"""Making the adapters of a plan: one compiled initialiser for all weights of a shape, each leaf laid out beside its kernel."""

from __future__ import annotations

import functools
import zlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.adapters import Adapters, check_params
from lowrank_jax.forms import leaf_sharding
from lowrank_jax.methods.base import Given, Leaves, Method
from lowrank_jax.plan import Entry, Plan, check_statistics, gather
from lowrank_jax.quantized import Quantized, layers
from lowrank_jax.sites import Site, flatten, mesh_of, named_sharding
from lowrank_jax.stats.statistics import Statistics
from lowrank_jax.unread import Unread


def init(
    key: jax.Array, params: Any, plan: Plan, dtype: Any = jnp.float32, statistics: Statistics | None = None
) -> Adapters:
    """Makes a plan's adapters.

    Each site's randomness depends on ``key`` and its path only. Where the base is sharded over a mesh the leaves are laid out
    beside their kernels. A weight that is quantised or still in its file is dense while its own site is made, a stack layer by layer.

    Args:
      key: a PRNG key. params: the model's parameters; read, never changed. dtype: storage dtype of floating leaves.
      statistics: what `lowrank_jax.collect` gathered, for methods whose init reads data.

    Raises:
      ValueError: parameters of another model than the plan's; statistics that are missing or of other weights.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=2)}))
      >>> jax.tree.map(jnp.shape, adapters.sites)
      {'layer/kernel': {'a': (4, 2), 'b': (2, 3)}}
    """
    flat = flatten(params)
    check_params(flat, plan)
    check_statistics(flat, plan, statistics)
    made = {}
    for entry in plan.entries:
        weight = flat[entry.site.path]
        mesh = mesh_of(weight)
        path_hash = _path_hash(entry.site.path)
        if _one_at_a_time(entry, weight):
            made[entry.site.path] = _init_layers(key, path_hash, entry, weight, jnp.dtype(dtype), mesh)
            continue
        make = _maker(entry.method, _anonymous(entry.site), entry.layers, jnp.dtype(dtype), mesh)
        made[entry.site.path] = make(key, path_hash, gather(entry, weight, statistics))
    shared = {}
    for name, (method, sites) in plan.shared.items():
        assert method.init_shared is not None
        leaves = method.init_shared(jax.random.fold_in(key, _path_hash(name)), sites)
        shared[name] = {k: _cast(v, plan.shared_leaves[name][k].dtype or dtype) for k, v in leaves.items()}
        beside = next(filter(None, (named_sharding(flat[entry.site.path]) for entry in plan.entries)), None)
        if beside is not None:
            shared[name] = jax.device_put(shared[name], NamedSharding(beside.mesh, PartitionSpec()))
    return Adapters(made, shared, plan)


def _path_hash(path: str) -> np.uint32:
    return np.uint32(zlib.crc32(path.encode()))


def _anonymous(site: Site) -> Site:
    return replace(site, path="")


@functools.lru_cache(maxsize=4096)
def _maker(method: Method, site: Site, layers: tuple[int, ...] | None, dtype: Any, mesh: Any) -> Any:
    """One jitted initialiser for all sites of the same shape."""
    entry = Entry(site, method, layers)

    def make(key: jax.Array, path_hash: jax.Array, given: Given) -> Leaves:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
        leaves = method.init(jax.random.fold_in(key, path_hash), entry.local, wide)
        return {name: _cast(value, entry.leaves[name].dtype or dtype) for name, value in leaves.items()}

    return jax.jit(make, out_shardings=_shardings(entry, mesh))


def _shardings(entry: Entry, mesh: Any) -> dict[str, NamedSharding] | None:
    found = {name: leaf_sharding(leaf, entry.local, mesh) for name, leaf in entry.leaves.items()}
    return {name: sharding for name, sharding in found.items() if sharding is not None} or None


def _one_at_a_time(entry: Entry, weight: Any) -> bool:
    """Whether a method starts from a stack that is not dense, and the same way from each of its layers."""
    own = isinstance(dict(entry.method.config).get("rank"), tuple)
    stacked = entry.site.batch[:1] == (0,) and entry.layers is None
    return isinstance(weight, Quantized | Unread) and stacked and entry.method.needs == {"kernel"} and not own


def _init_layers(
    key: jax.Array, path_hash: np.uint32, entry: Entry, weight: Any, dtype: Any, mesh: Any
) -> dict[str, jax.Array]:
    """The leaves of a stack, made layer by layer: no more than one is dense."""
    make = _maker(entry.method, _anonymous(entry.site.layer), None, dtype, None)
    keys = jax.random.split(key, entry.site.shape[0])
    made = [
        make(keys[n], path_hash, Given(kernel=entry.site.layer.canonical(layer)))
        for n, layer in enumerate(layers(weight))
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    shardings = _shardings(entry, mesh)
    return stacked if shardings is None else jax.device_put(stacked, shardings)


def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
