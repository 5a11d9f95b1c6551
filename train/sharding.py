"""Where the arrays of a run lie: base, batches and states on the mesh of its configuration."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_jax import shard
from lowrank_jax.models import logical_axes
from lowrank_jax.unread import Unread

P = ParamSpec("P")
R = TypeVar("R")


def make_mesh(sizes: ml_collections.ConfigDict) -> Mesh | None:
    """A mesh of the given sizes over the first devices of all processes; None where one device is enough.

    Raises:
      ShardingError: more devices asked for than there are, or of several processes not all.
    """
    needed = math.prod(sizes.values())
    if jax.process_count() > 1 and needed != jax.device_count():
        raise shard.ShardingError(
            f"config.mesh={dict(sizes)} is for {needed} of the {jax.device_count()} devices of {jax.process_count()} processes; "
            f"expected all, such as --config.mesh.data={jax.device_count()}."
        )
    return None if needed == 1 else shard.mesh(sizes)


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
    return jax.tree.map(put, params, shard.layout(params, mesh, names=logical_axes(config)))


def put(leaf: Any, where: NamedSharding) -> Any:
    """An array that every process holds in full, or that is on the devices already, laid out anew; one in its file when it is read."""
    if isinstance(leaf, Unread):
        return leaf.laid(where)
    if jax.process_count() == 1 or isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, where)
    # device_put would have the processes compare the values of every single array first.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def share(mesh: Mesh | None, rows: int) -> np.ndarray:
    """The rows of a global batch that this process has to read, ascending; several processes may read the same.

    Example:
      >>> share(None, 4).tolist()
      [0, 1, 2, 3]
    """
    if mesh is None:
        return np.arange(rows)
    parts = _by_rows(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """A batch on its way to the devices, rows dealt out over the axes of `shard.ROWS`, from every process's `share`.

    Returns at once: the copy goes on while the devices are busy with the step before.
    """
    if mesh is None:
        return jax.device_put(dict(batch))
    return {k: jax.make_array_from_process_local_data(_by_rows(mesh), v) for k, v in batch.items()}


def within(mesh: Mesh | None, function: Callable[P, R]) -> Callable[P, R]:
    """``function``, to be jitted, with the mesh set: our models then keep the rows of their activations dealt out."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """``tree`` with every array on the mesh: those that are not there yet are replicated."""
    if mesh is None:
        return tree

    def there(leaf: Any) -> bool:
        return isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh

    return jax.tree.map(lambda leaf: leaf if there(leaf) else put(leaf, everywhere(mesh)), tree)


def _by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(shard.ROWS))
