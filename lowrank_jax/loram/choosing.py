"""Choosing what is kept of each block."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.loram.units import Kept, Units
from lowrank_jax.sites import Site, flatten, matches, no_match
from lowrank_jax.sites import sites as find_sites


def choose(
    key: jax.Array,
    params: Any,
    rules: Mapping[str, Units],
    by: Literal["random", "magnitude"] = "random",
    sites: Mapping[str, Site] | None = None,
) -> dict[str, Kept]:
    """Chooses what is kept of each block. The same arguments make the same choice.

    Args:
      rules: ``{pattern: units}``; a pattern is a regular expression that matches the whole path of a block, such as ``.*/attention``.
      by: ``random``, or ``magnitude``: the units with the largest sum of squares over all weights that write or read them.
      sites: what `lowrank_jax.linen.sites` or `lowrank_jax.nnx.sites` found; None: what the parameters alone tell.

    Returns:
      ``{path of a weight: Kept}``.

    Raises:
      ValueError: a pattern that matches no block with such modules, a number of units that does not divide a weight, a share
        outside (0, 1].

    Example:
      >>> from lowrank_jax.loram import features, prune
      >>> params = {"mlp": {"up_proj": {"kernel": jnp.ones((2, 8))}, "down_proj": {"kernel": jnp.ones((8, 2))}}}
      >>> kept = choose(jax.random.key(0), params, {".*/mlp": features(keep=0.5)})
      >>> jax.tree.map(jnp.shape, prune(params, kept))
      {'mlp': {'down_proj': {'kernel': (4, 2)}, 'up_proj': {'kernel': (2, 4)}}}
    """
    if by not in ("random", "magnitude"):
        raise ValueError(f"choose(by={by!r}): expected 'random' or 'magnitude'.")
    found = {
        path: site for path, site in (find_sites(params) if sites is None else sites).items() if site.kind == "dense"
    }
    flat = flatten(params)
    kept: dict[str, Kept] = {}
    for pattern, units in rules.items():
        if not 0 < units.keep <= 1:
            raise ValueError(f"Rule for {pattern!r}: keep={units.keep}: expected a share in (0, 1].")
        blocks: dict[str, list[Site]] = {}
        for site in found.values():
            block, _, name = site.module.rpartition("/")
            if name in units.outputs + units.inputs and matches(pattern, f"{block}/"):
                blocks.setdefault(block, []).append(site)
        if not blocks:
            raise ValueError(
                no_match(f"Rule for {pattern!r} ({', '.join(units.outputs + units.inputs)})", pattern, found)
            )
        for block, members in blocks.items():
            kept |= _choose_in(jax.random.fold_in(key, np.uint32(zlib.crc32(block.encode()))), flat, units, members, by)
    return kept


def _choose_in(key: jax.Array, flat: Mapping[str, Any], units: Units, members: list[Site], by: str) -> dict[str, Kept]:
    writes = lambda site: site.module.rpartition("/")[2] in units.outputs  # noqa: E731
    width = lambda site: site.n_out if writes(site) else site.n_in  # noqa: E731
    axis = lambda site: (site.outputs if writes(site) else site.inputs)[0]  # noqa: E731
    number = min(map(width, members)) if units.number is None else units.number
    for site in members:
        if site.shape[axis(site)] % number or site.batch_shape != members[0].batch_shape:
            raise ValueError(
                f"{site.path} has shape {site.shape}: axis {axis(site)} is not {number} equal units, as those of {members[0].path} are. "
                "Check the number of heads, and which modules of the block write and read them."
            )
    batch = members[0].batch_shape
    if by == "random":
        score = jax.random.uniform(key, (*batch, number))
    else:
        score = jnp.zeros((*batch, number))
        for site in members:
            squares = site.canonical(jnp.asarray(flat[site.path])).astype(jnp.float32) ** 2
            score += squares.sum(-2 if writes(site) else -1).reshape(*batch, number, -1).sum(-1)
    count = max(round(units.keep * number), 1)
    chosen = np.sort(np.argsort(-np.asarray(score), axis=-1, kind="stable")[..., :count], axis=-1)

    def positions(site: Site) -> np.ndarray:
        block = width(site) // number
        return (chosen[..., None] * block + np.arange(block)).reshape(*batch, -1)

    return {s.path: Kept(s, None, positions(s)) if writes(s) else Kept(s, positions(s), None) for s in members}
