"""Where arrays lie on a mesh with the axes 'data', 'fsdp' and 'tensor'."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.models import logical_axes

AXES = ("data", "fsdp", "tensor")
# Megatron's division: the wide side of every projection over 'tensor', the model's width over 'fsdp'.
_RULES: Mapping[str | None, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
}


def make_mesh(sizes: ml_collections.ConfigDict) -> Mesh | None:
    """A mesh of the given sizes over the first devices; None where one device is enough.

    Raises:
      ValueError: more devices asked for than there are.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    needed = math.prod(shape)
    if needed == 1:
        return None
    if needed > jax.device_count():
        raise ValueError(f"config.mesh={dict(sizes)} needs {needed} devices; {jax.device_count()} are there.")
    # Under Explicit axes, the default of newer JAX, unmodified Flax models raise.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:needed])


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

    return jax.tree.map(
        lambda leaf, axes: jax.device_put(leaf, named(leaf.shape, axes, mesh)), params, logical_axes(config)
    )


def named(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter from the names of its axes."""
    return NamedSharding(
        mesh, PartitionSpec(*(_fit(_RULES.get(axis), size, mesh) for axis, size in zip(axes, shape, strict=True)))
    )


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


def _fit(axis: str | None, size: int, mesh: Mesh) -> str | None:
    return axis if axis is not None and size % mesh.shape[axis] == 0 else None
