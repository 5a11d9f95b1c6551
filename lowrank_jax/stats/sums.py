"""The running sums of statistics: where they lie on a mesh, how they are kept and taken up again, and the means they end as."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.forms import Leaf, leaf_spec
from lowrank_jax.sites import Site, named_sharding
from lowrank_jax.stats import statistics
from lowrank_jax.stats.statistics import Statistics, check_finite, fingerprint

Sums = dict[str, dict[str, jax.Array]]
Wanted = Mapping[str, Mapping[str, Site]]


def shapes(wanted: Wanted) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """What is summed for ``{kind: {path: site}}``: the kinds, and with ``covariance`` the ``count`` of inputs; float32."""
    out: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for kind, sites in wanted.items():
        for path, site in sites.items():
            last = site.n_out if kind == "gradient" else site.n_in
            of = {kind: (*site.batch_shape, site.n_in, last)} | (
                {"count": site.batch_shape} if kind == "covariance" else {}
            )
            for name, shape in of.items():
                out.setdefault(name, {})[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return out


def layout(wanted: Wanted, flat: Mapping[str, Any]) -> dict[str, dict[str, NamedSharding | None]]:
    """Where each sum lies: a gradient's as the weight, the rows of a covariance divided as far as the mesh allows; None: no mesh."""
    sites = {path: site for of in wanted.values() for path, site in of.items()}
    return {
        kind: {path: _sharding(kind, sites[path], named_sharding(flat[path])) for path in of}
        for kind, of in shapes(wanted).items()
    }


def _sharding(kind: str, site: Site, weight: NamedSharding | None) -> NamedSharding | None:
    if weight is None:
        return None
    mesh, site = weight.mesh, replace(site, spec=weight.spec)
    *stack, rows, columns = leaf_spec(Leaf((site.n_in, site.n_out), ("in", "out")), site)  # type: ignore[misc]
    if kind == "gradient":
        return NamedSharding(mesh, PartitionSpec(*stack, rows, columns))
    if kind == "count":
        return NamedSharding(mesh, PartitionSpec(*stack))
    taken = set(jax.tree.leaves(stack))
    for axis in (rows, columns, *mesh.axis_names):
        names = jax.tree.leaves(axis)
        size = math.prod(mesh.shape[name] for name in names)
        if size > 1 and site.n_in % size == 0 and not taken & set(names):
            return NamedSharding(mesh, PartitionSpec(*stack, axis, None))
    return NamedSharding(mesh, PartitionSpec(*stack, None, None))


def start(wanted: Wanted, where: Mapping[str, Mapping[str, NamedSharding | None]]) -> Sums:
    """Zeros."""
    return {
        kind: {path: jnp.zeros(x.shape, x.dtype, device=where[kind][path]) for path, x in of.items()}
        for kind, of in shapes(wanted).items()
    }


def load(
    file: pathlib.Path, wanted: Wanted, flat: Mapping[str, Any], where: Mapping[str, Mapping[str, NamedSharding | None]]
) -> tuple[Sums, int]:
    """What a stopped run left, and how many batches are in it.

    Raises:
      ValueError: the sums of other kinds, weights or parameters.
    """
    left = statistics.load(file)
    if {kind: set(of) for kind, of in left.values.items()} != {kind: set(of) for kind, of in shapes(wanted).items()}:
        raise ValueError(
            f"{file} holds the sums of another plan or of other statistics. Pass another directory, or delete it."
        )
    sums = {
        kind: {path: jax.device_put(left.of(kind, path, flat[path]), place) for path, place in of.items()}
        for kind, of in where.items()
    }
    return sums, left.batches


def save(sums: Sums, batches: int, flat: Mapping[str, Any], file: pathlib.Path) -> None:
    """Writes the sums; nothing is written where one is not finite, as they could never be used."""
    check_finite(sums)
    file.parent.mkdir(parents=True, exist_ok=True)
    prints = {path: fingerprint(flat[path]) for of in sums.values() for path in of}
    Statistics(sums, prints, batches).save(file)


def means(sums: Sums, batches: int, flat: Mapping[str, Any]) -> Statistics:
    """Gradients over batches, covariances over inputs.

    Raises:
      ValueError: a sum that is not finite, or a weight whose inputs were never seen; names it.
    """
    check_finite(sums)
    unseen = [path for path, count in sums.get("count", {}).items() if not bool((count > 0).all())]
    if unseen:
        raise ValueError(
            f"{unseen[0]}: no batch reached it (all of its stack), so it has no covariance. Leave it out, or pass batches that use it."
        )
    values: Sums = {}
    for kind, of in sums.items():
        if kind != "count":
            over = {path: sums["count"][path][..., None, None] if kind == "covariance" else batches for path in of}
            values[kind] = {path: x / over[path] for path, x in of.items()}
    return Statistics(values, {path: fingerprint(flat[path]) for of in values.values() for path in of}, batches)
