"""Any method as a LoRA: what serving, combining and exporting adapters of different methods is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters, check_params
from lowrank_jax.convert.factors import Factors, Rank, check_target, reduced, squared_distance, squared_norm, stacked
from lowrank_jax.convert.updates import update_of
from lowrank_jax.forms import UnsupportedError, leaf_sharding
from lowrank_jax.methods.base import Leaves
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.ranks import largest, of_stack
from lowrank_jax.plan import Entry, Plan
from lowrank_jax.sites import flatten, hits, mesh_of


class Conversion(NamedTuple):
    """Adapters, and how far the update of each weight is from what it stands for.

    Attributes:
      adapters: the new ones.
      error: ``{path: |new - old| / |old|}`` in the Frobenius norm over the whole stack; 0.0 where nothing was computed anew.
    """

    adapters: Adapters
    error: dict[str, float]


def to_lora(
    params: Any,
    adapters: Adapters,
    rank: Rank = None,
    *,
    tolerance: float | None = None,
    keep: Sequence[str] = (),
    svd: Literal["exact", "randomized"] = "exact",
    dtype: Any = jnp.float32,
) -> Conversion:
    """Adapters of any methods as adapters of the method `lora`, on the same base.

    A low-rank form converts exactly: its factors are kept, a core and the scale multiplied in, an anchor (PiSSA, LaMDA) beside them.
    Any other update is decomposed, one matrix of a stack at a time, and cut to its leading singular directions, which is the nearest
    LoRA of that rank. The scale is 1: alpha = rank. Matrices of a stack that keep different numbers of directions are padded
    (``lora(rank=(...))``). Runs on the host, not under jit.

    Args:
      params: the base; None where no method reads it (the low-rank ones do not).
      rank: None: everything there is, exact to rounding, at most the weight's smaller dimension; a number: at most so many directions;
        a float in (0, 1]: as few as hold this share of the update's squared Frobenius norm.
      tolerance: the largest error allowed at a weight; None: any, see the result.
      keep: patterns of weights that stay as they are, such as a head trained in full. A LoRA within ``rank`` always does.
      svd: ``exact``, or ``randomized`` (range finder) for large weights and a number of directions.
      dtype: storage dtype of the new leaves.

    Raises:
      ValueError: folded or stacked adapters, a rank of 0 or a share outside (0, 1], an error above the tolerance (names the site), a
        pattern that matches nothing.
      UnsupportedError: an update that is no matrix: a nonlinear form, a change of a bias, a bias or norm trained in full.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.eye(8, 6)}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora_xs(rank=4)}))
      >>> converted, error = lr.to_lora(params, adapters, rank=2)
      >>> converted.sites["layer/kernel"]["a"].shape, error["layer/kernel"] < 1
      ((8, 2), True)
    """
    check_plain("to_lora", adapters)
    check_target(rank)
    flat = None if params is None else flatten(params)
    if flat is not None:
        check_params(flat, adapters.plan)
    kept = _kept(adapters.plan, keep)
    entries, sites, errors = [], dict(adapters.sites), {}
    for entry in adapters.plan.entries:
        path, error = entry.site.path, 0.0
        if path not in kept and not _is_lora(entry, rank):
            if entry.site.kind == "param":
                raise UnsupportedError(
                    f"{path}: {entry.method.name} of a bias or norm is no LoRA; leave it as it is with keep=, or merge it."
                )
            update = update_of(adapters, path, flat)
            entry, leaves, error = as_lora(entry, (update.at(n) for n in update.numbers), rank, svd, dtype)
            sites[path] = placed(entry, leaves, None if flat is None else flat[path])
        if tolerance is not None and error > tolerance:
            raise ValueError(
                f"to_lora: the LoRA of rank {dict(entry.method.config)['rank']} at {path} is {error:.2g} of the update away from it, "
                f"more than tolerance={tolerance}. Allow a higher rank."
            )
        entries.append(entry)
        errors[path] = error
    plan = replace(adapters.plan, entries=tuple(entries))
    return Conversion(Adapters(sites, {name: adapters.shared[name] for name in plan.shared}, plan), errors)


def as_lora(
    entry: Entry,
    updates: Iterable[Factors | np.ndarray],
    rank: Rank,
    svd: Literal["exact", "randomized"] = "exact",
    dtype: Any = jnp.float32,
) -> tuple[Entry, dict[str, np.ndarray], float]:
    """A site's updates, one for each matrix of ``entry.local``, as the method `lora`: its entry, its leaves, and the error."""
    parts, distance, norm = [], 0.0, 0.0
    for update in updates:
        size = squared_norm(update)
        if not math.isfinite(size):
            raise ValueError(f"{entry.site.path}: the update is not finite; nothing was converted.")
        part, anew = reduced(update, rank, svd)
        part = part._replace(a=part.a.astype(dtype), b=part.b.astype(dtype))
        norm += size
        distance += squared_distance(update, part) if anew or dtype != jnp.float32 else 0.0
        parts.append(part)
    ranks = [part.rank for part in parts]
    new = replace(entry, method=lora(rank=ranks[0] if len(set(ranks)) == 1 else of_stack(ranks, entry.local)))
    return new, stacked(parts, entry.local.batch_shape), math.sqrt(distance / norm) if norm else 0.0


def placed(entry: Entry, leaves: Mapping[str, Any], beside: Any) -> Leaves:
    """Leaves on the device, over the mesh of ``beside`` if it lies on one, as `lowrank_jax.init` lays them."""
    where = {name: leaf_sharding(leaf, entry.local, mesh_of(beside)) for name, leaf in entry.leaves.items()}
    if None in where.values():
        return {name: jnp.asarray(x) for name, x in leaves.items()}
    return {name: jax.device_put(x, where[name]) for name, x in leaves.items()}


def check_plain(what: str, adapters: Adapters) -> None:
    """Raises a ValueError for a folded adapter and for a stack."""
    if adapters.folded or adapters.stacked is not None:
        how = "folded into another base; unfold it first" if adapters.folded else "a stack; take one of it"
        raise ValueError(f"{what}: the adapter is {how} (lowrank_jax.{'unfold' if adapters.folded else 'take'}).")


def _is_lora(entry: Entry, rank: Rank) -> bool:
    if entry.method.name != "lora" or isinstance(rank, float):
        return False
    return rank is None or largest(dict(entry.method.config)["rank"]) <= rank


def _kept(plan: Plan, keep: Sequence[str]) -> set[str]:
    kept: set[str] = set()
    for pattern in keep:
        kept |= set(hits(f"keep={pattern!r}", pattern, plan.by_path))
    for name, (method, sites) in plan.shared.items():
        paths = {entry.site.path for entry in plan.entries if str(entry.method) == name}
        if kept & paths and paths - kept:
            raise ValueError(
                f"keep: the {len(sites)} sites of {method.name} share leaves; keep all of them ({', '.join(sorted(paths))}) or none."
            )
    return kept
