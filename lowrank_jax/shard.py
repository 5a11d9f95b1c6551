"""Where the weights of any model lie on a device mesh: by the names of their axes, by their shapes, or by pattern.

Only the base needs a layout. Adapters, their anchors and an optimizer's state inherit from the kernel they belong to (`lowrank_jax.init`
reads the shardings of the parameters), so that nothing else has to be said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.forms.base import REPLICATED_BELOW
from lowrank_jax.sites import Site, flatten, hits, with_leaves
from lowrank_jax.sites import sites as sites_of

AXES = ("data", "fsdp", "tensor", "expert")
ROWS = ("data", "fsdp", "expert")
"""The axes over which the rows of a batch are dealt out; within a mixture the devices of 'expert' exchange tokens instead."""
Axes = str | tuple[str, ...] | None
"""The mesh axes over which one axis of an array is divided."""
_WIDTH = ("fsdp", "expert")
# Megatron's division: the wide side of every projection over 'tensor', the model's width over 'fsdp'; over 'expert' as well where the
# weight has no experts of its own.
RULES: Mapping[str, Axes] = MappingProxyType(
    {"embed": _WIDTH, "vocab": "tensor", "mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "experts": "expert"}
)


class ShardingError(ValueError):
    """A mesh that the devices do not allow, or a layout that a weight does not allow."""


def mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes 'data', 'fsdp', 'tensor' and 'expert'.

    Args:
      sizes: of the axes; an axis that is not named has size 1. devices: the first of them are taken, in their order (they may be only
        described, as those of a topology); None: of all there are, in the order JAX finds fastest.

    Returns:
      A mesh whose axes are of type Auto, under which unmodified Flax models run.

    Raises:
      ShardingError: an unknown axis, a size below 1, or more devices than there are.

    Example:
      >>> dict(mesh({"fsdp": 1}).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1, 'expert': 1}
    """
    if unknown := [axis for axis in sizes if axis not in AXES]:
        raise ShardingError(f"mesh axis {unknown[0]!r}: expected {', '.join(AXES)}.")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if min(shape) < 1:
        raise ShardingError(f"mesh {dict(sizes)}: expected sizes of at least 1.")
    there, needed = list(jax.devices() if devices is None else devices), math.prod(shape)
    if needed > len(there):
        raise ShardingError(f"mesh {dict(sizes)} needs {needed} devices; {len(there)} are there.")
    types = (AxisType.Auto,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=there[:needed])
    return Mesh(np.array(there[:needed], dtype=object).reshape(shape), AXES, axis_types=types)


def layout(
    params: Any,
    mesh: Mesh,
    *,
    names: Any = None,
    rules: Mapping[str, Axes] = RULES,
    overrides: Mapping[str, Sequence[str | None]] = MappingProxyType({}),
    sites: Mapping[str, Site] | None = None,
) -> Any:
    """A NamedSharding for every parameter.

    By names, where the model gives its axes names (`lowrank_jax.models.logical_axes`); otherwise by shape: of a matrix the longer side lies
    over 'tensor' and the other over 'fsdp' and 'expert', the first axis of a stack of experts over 'expert' instead, layers of a scan stay
    together, and what is neither (biases, norms, small weights) is replicated. An axis that a mesh axis does not divide stays whole.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      names: a tree of the same structure, one name or None an axis; None: by shape. rules: ``{name: mesh axis or axes}``.
      overrides: ``{pattern: (mesh axis or None, ...)}`` for the paths that match, one entry an axis of the weight; the later wins.
      sites: the roles of the axes, from `lowrank_jax.linen.sites` or `lowrank_jax.nnx.sites`; None: what the parameters alone tell.

    Returns:
      A tree like ``params`` of NamedShardings, for `jax.device_put`, `jax.jit` or ``abstract`` arrays.

    Raises:
      ShardingError: an override of the wrong length, or with an axis that the mesh does not have, that does not divide the weight or that
        is there twice.
      ValueError: an override that matches nothing; names the nearest paths.

    Example:
      >>> weights = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), "float32")}}
      >>> layout(weights, mesh({"tensor": 1}))["up"]["kernel"].spec
      P('fsdp', 'tensor')
      >>> layout(weights, mesh({}), overrides={"up": (None, "data")})["up"]["kernel"].spec
      P(None, 'data')
    """
    flat = flatten(params)
    specs: dict[str, tuple[Axes, ...]]
    if names is None:
        roles = sites_of(params) if sites is None else sites
        specs = {path: _by_shape(leaf.shape, roles.get(path)) for path, leaf in flat.items()}
    else:
        leaves = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
        specs = {
            path: tuple(rules.get(name) if name else None for name in axes)
            for path, axes in zip(flat, leaves, strict=True)
        }
    shardings = {path: NamedSharding(mesh, fitted(flat[path].shape, spec, mesh)) for path, spec in specs.items()}
    for pattern, spec in overrides.items():
        for path in hits(f"overrides={{{pattern!r}: ...}}", pattern, flat):
            shardings[path] = NamedSharding(mesh, _checked(pattern, path, flat[path].shape, spec, mesh))
    return with_leaves(params, shardings)


def fitted(shape: Sequence[int], spec: Sequence[Axes], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """A PartitionSpec for an array of this shape, without mesh axes that do not divide it, were used before or are not the mesh's.

    Of several mesh axes for one of the array's, those of size one are left out.

    Example:
      >>> fitted((6, 5, 4), ("fsdp", "rows", "fsdp"), mesh({"fsdp": 1}))
      P('fsdp', None, None)
      >>> fitted((6, 4), (None, ("fsdp", "expert")), mesh({"fsdp": 1}))
      P(None, 'fsdp')
    """
    used: set[str] = set()
    places: list[Axes] = []
    for size, axes in zip(shape, spec, strict=True):
        fit: tuple[str, ...] = ()
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis in mesh.shape and axis not in used and size % math.prod(mesh.shape[a] for a in (*fit, axis)) == 0:
                fit += (axis,)
        fit = tuple(axis for axis in fit if mesh.shape[axis] > 1) or fit[:1]
        used.update(fit)
        places.append(fit if len(fit) > 1 else next(iter(fit), None))
    return PartitionSpec(*places)


def by_rows(x: jax.Array) -> jax.Array:
    """Pins the first axis of an activation to the mesh axes over which batches are dealt out; to be used in models of your own.

    Without it the compiler may follow the weights instead, and have every device work on all rows. It is the identity outside of
    `jax.jit`, where no mesh is set (`jax.set_mesh`), where that has none of these axes, and where they do not divide the rows.

    Args:
      x: ``[rows, ...]``, of any dtype.

    Example:
      >>> by_rows(np.ones((4, 2))).shape
      (4, 2)
    """
    return _pinned(x, ROWS)


def by_experts(x: jax.Array) -> jax.Array:
    """Pins what a mixture's experts work on: experts over the mesh axis 'expert', rows over the others of `by_rows`.

    It is the identity where `by_rows` is one.

    Args:
      x: ``[experts, rows, ...]``, of any dtype.

    Example:
      >>> by_experts(np.ones((4, 2, 3))).shape
      (4, 2, 3)
    """
    return _pinned(x, ("expert",), [axis for axis in ROWS if axis != "expert"])


def whole(factors: Any) -> Any:
    """Puts the factors of one layer together on every device before they are used, as weights of a layer are over 'fsdp'.

    They are small. Left divided, the compiler would rather multiply piece by piece and put the wide output together. The identity where
    `by_rows` is one too.

    Args:
      factors: a tree; of its leaves ``[*batch, m, n]`` the last two axes are put together.

    Example:
      >>> whole({"a": np.ones((4, 2))})["a"].shape
      (4, 2)
    """
    if not _there(ROWS):
        return factors

    def put_together(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer) or leaf.ndim < 2:
            return leaf
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 2)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*free, None, None))

    return jax.tree.map(put_together, factors)


def _there(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of the mesh that is set, without the ones of size 1."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def _pinned(x: Any, *places: Sequence[str]) -> Any:
    """An activation with its first axes over mesh axes, one set of them each; as it is where these are not there or do not divide it."""
    sizes, over = jax.sharding.get_abstract_mesh().shape, [_there(axes) for axes in places]
    uneven = any(size % math.prod(sizes[axis] for axis in axes) for size, axes in zip(x.shape, over, strict=False))
    if not any(over) or uneven or not isinstance(x, jax.core.Tracer):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(places))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes or None for axes in over), *free))


def _by_shape(shape: tuple[int, ...], site: Site | None) -> tuple[Axes, ...]:
    spec: list[Axes] = [None] * len(shape)
    if site is None or site.kind == "param" or math.prod(shape) < REPLICATED_BELOW:
        return tuple(spec)
    wide, narrow = (site.outputs, site.inputs) if site.n_out >= site.n_in else (site.inputs, site.outputs)
    spec[wide[0]], spec[narrow[0]] = "tensor", _WIDTH
    for axis in [axis for axis in site.batch if axis not in site.scanned][:1]:
        spec[axis], spec[narrow[0]] = "expert", "fsdp"
    return tuple(spec)


def _checked(pattern: str, path: str, shape: tuple[int, ...], spec: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    field = f"overrides={{{pattern!r}: {tuple(spec)}}}"
    if len(spec) != len(shape):
        raise ShardingError(
            f"{field}: {path} has shape {shape}; expected one mesh axis or None for each of its {len(shape)} axes."
        )
    for n, (size, axis) in enumerate(zip(shape, spec, strict=True)):
        if axis is not None and axis in spec[:n]:
            raise ShardingError(f"{field}: {axis!r} is there twice; a mesh axis divides one axis of a weight.")
        if axis is not None and axis not in mesh.shape:
            raise ShardingError(f"{field}: the mesh has no axis {axis!r}; its axes are {', '.join(mesh.axis_names)}.")
        if axis is not None and size % mesh.shape[axis]:
            raise ShardingError(
                f"{field}: {path} has shape {shape}, whose {size} the {mesh.shape[axis]} devices of {axis!r} do not divide."
            )
    return PartitionSpec(*spec)
