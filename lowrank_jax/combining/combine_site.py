"""The combination of several adapters at one weight; see `lowrank_jax.combine`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.combining import task_vectors
from lowrank_jax.convert.conversion import as_lora, placed
from lowrank_jax.convert.factors import Factors, Rank, joined
from lowrank_jax.convert.updates import Update, common_entry, numbers, update_of
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.methods.base import Leaves
from lowrank_jax.methods.full import full
from lowrank_jax.plan import Entry, local_kernel


class Recipe(NamedTuple):
    """The options of `lowrank_jax.combine`."""

    method: str
    density: float | None
    key: jax.Array | None
    sign: Literal["total", "frequency"]
    scope: str
    rank: Rank
    svd: Literal["exact", "randomized"]

    @property
    def prunes(self) -> bool:
        return self.density is not None and self.density < 1

    @property
    def trims(self) -> bool:
        return self.prunes and self.method in ("ties", "magnitude_prune")

    @property
    def elects(self) -> bool:
        return self.method in ("ties", "dare_ties")


class Member(NamedTuple):
    """One of the adapters: its number, itself, its weight, and the magnitude its entries have to reach (None: any)."""

    number: int
    adapters: Adapters
    weight: float
    least: float | None


def combine_site(
    path: str, members: Sequence[Member], recipe: Recipe, flat: Mapping[str, Any] | None
) -> tuple[Entry, Leaves, float]:
    """One weight's combination: its entry, leaves and error."""
    try:
        updates = [update_of(member.adapters, path, flat) for member in members]
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} To use several at once on this weight see lowrank_jax.add.") from error
    entry = common_entry("combine", [update.entry for update in updates])
    low_rank = recipe.method in ("sum", "svd", "linear") and all(update.low_rank for update in updates)
    rank = max(map(_rank, updates)) if recipe.method == "svd" and recipe.rank is None else recipe.rank
    dense = entry.site.kind == "param" or (rank is None and not low_rank)
    if dense:  # a full weight holds all layers of its stack
        entry = replace(entry, method=full(), layers=None)
    each = (_matrix(path, n, members, updates, recipe) for n in numbers(entry))
    if not dense:
        entry, leaves, distance = as_lora(entry, each, rank, recipe.svd)
        return entry, placed(entry, leaves, None if flat is None else flat[path]), distance
    if flat is None:
        raise ValueError(
            f"{path}: the result is a full weight, which takes the base to make: pass params=, or rank= for a LoRA of it."
        )
    kernel = np.asarray(local_kernel(entry, jnp.asarray(flat[path])), np.float32)
    change = np.stack([matrix for matrix in each if isinstance(matrix, np.ndarray)])
    return entry, placed(entry, {"weight": kernel + change.reshape(kernel.shape)}, flat[path]), 0.0


def _matrix(
    path: str, n: int, members: Sequence[Member], updates: Sequence[Update], recipe: Recipe
) -> Factors | np.ndarray:
    """The combined update of one matrix."""
    here = [(member, update) for member, update in zip(members, updates, strict=True) if n in update.numbers]
    weights = [member.weight for member, _ in here]
    if recipe.method == "linear":
        return _linear(path, [_factors(update, n) for _, update in here], weights)
    if recipe.method in ("sum", "svd") and all(update.factors is not None for _, update in here) and here:
        return joined([_factors(update, n) for _, update in here], weights)
    changes = [update.dense(n) for _, update in here]
    if not changes:
        return np.zeros((updates[0].entry.site.n_in, updates[0].entry.site.n_out), np.float32)
    least, keys = None, None
    if recipe.trims:
        least = [
            task_vectors.threshold([change], recipe.density) if member.least is None else member.least  # type: ignore[arg-type]
            for (member, _), change in zip(here, changes, strict=True)
        ]
    elif recipe.prunes:
        place = np.uint32(zlib.crc32(f"{path}:{n}".encode()))
        keys = [jax.random.fold_in(jax.random.fold_in(recipe.key, member.number), place) for member, _ in here]  # type: ignore[arg-type]
    elect = recipe.sign if recipe.elects else None
    return task_vectors.merge(changes, weights, least=least, keys=keys, density=recipe.density or 1.0, elect=elect)


def _linear(path: str, factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    ranks = [part.rank for part in factors]
    if len(set(ranks)) != 1:
        raise ValueError(
            f"combine: 'linear' adds factors of one rank, and at {path} they have {ranks}; use 'sum' or 'svd'."
        )
    scales = [np.float32(part.scale * weight) for part, weight in zip(factors, weights, strict=True)]
    a = [np.copysign(np.sqrt(abs(scale)), scale) * part.a for scale, part in zip(scales, factors, strict=True)]
    b = [np.sqrt(abs(scale)) * part.b for scale, part in zip(scales, factors, strict=True)]
    return Factors(np.sum(a, 0), np.sum(b, 0))


def least_magnitude(one: Adapters, recipe: Recipe, flat: Mapping[str, Any] | None) -> float | None:
    """The magnitude that an adapter's largest entries reach over the whole model."""
    if not recipe.trims or recipe.scope == "matrix":
        return None
    assert recipe.density is not None
    updates = [update_of(one, path, flat) for path in one.plan.by_path]
    return task_vectors.threshold([u.dense(n) for u in updates for n in u.numbers], recipe.density)


def _factors(update: Update, n: int) -> Factors:
    factors = update.at(n)
    if isinstance(factors, Factors):
        return factors
    path, name = update.entry.site.path, update.entry.method.name
    raise UnsupportedError(
        f"combine: 'linear' adds factors, and {name} at {path} has none that are low-rank; use 'sum'."
    )


def _rank(update: Update) -> int:
    if update.factors is not None:
        return update.factors.a.shape[-1]
    path, name = update.entry.site.path, update.entry.method.name
    if update.low_rank:
        return update.entry.site.max_rank
    raise ValueError(f"combine: {name} at {path} has no rank of its own; give 'svd' a rank=.")
