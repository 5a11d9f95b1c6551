"""Where the arrays of a run lie: base, batches and states on the mesh of its configuration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax import shard
from lowrank_jax.models import logical_axes


def make_mesh(sizes: ml_collections.ConfigDict) -> Mesh | None:
    """A mesh of the given sizes over the first devices; None where one device is enough.

    Raises:
      ShardingError: more devices asked for than there are.
    """
    return None if math.prod(sizes.values()) == 1 else shard.mesh(sizes)


@contextlib.contextmanager
def loading(mesh: Mesh | None) -> Iterator[None]:
    """While it lasts arrays are made on the host where a mesh waits for them: no single device has to hold the whole model."""
    if mesh is None:
        yield
        return
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def place(params: Any, config: Any, mesh: Mesh | None) -> Any:
    """Parameters of one of our models laid over the mesh by their logical axes; an axis that does not divide stays whole."""
    if mesh is None:
        return params
    return jax.device_put(params, shard.layout(params, mesh, names=logical_axes(config)))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """A batch with its rows dealt out over 'data' and 'fsdp'."""
    if mesh is None:
        return dict(batch)
    return {k: jax.device_put(v, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))) for k, v in batch.items()}


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """``tree`` with every array on the mesh: those that are not there yet are replicated."""
    if mesh is None:
        return tree

    def put(leaf: Any) -> Any:
        there = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)
