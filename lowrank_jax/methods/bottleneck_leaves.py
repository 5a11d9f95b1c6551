"""What the methods made of bottlenecks have in common: leaves, widths, inits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax.forms import Leaf
from lowrank_jax.methods.base import Leaves, random_a
from lowrank_jax.sites import Site

Position = Literal["parallel", "sequential", "before"]
Init = Literal["xavier", "normal", "kaiming"]
INITS = ("xavier", "normal", "kaiming")

# Which side of the weight a bottleneck reads and which it writes to.
_SIDES = {"parallel": ("in", "out"), "sequential": ("out", "out"), "before": ("in", "in")}


def bottleneck_leaves(site: Site, position: Position, width: int, bias: bool, prefix: str = "") -> dict[str, Leaf]:
    """``down [n_source, width]``, ``up [width, n_target]`` and, with ``bias``, ``down_bias [width]`` and ``up_bias [n_target]``."""
    source, target = _SIDES[position]
    size = {"in": site.n_in, "out": site.n_out}
    leaves = {
        "down": Leaf((size[source], width), (source, "rank")),
        "up": Leaf((width, size[target]), ("rank", target)),
    }
    if bias:
        leaves |= {"down_bias": Leaf((width,), ("rank",)), "up_bias": Leaf((size[target],), (target,))}
    return {prefix + name: leaf for name, leaf in leaves.items()}


def zero_up(key: jax.Array, site: Site, leaves: Mapping[str, Leaf], init: Init) -> Leaves:
    """A random ``down`` and zeros elsewhere, so that the update starts at zero; any prefix. ``init``: see `random_down`."""
    made = {name: jnp.zeros((*site.batch_shape, *leaf.shape)) for name, leaf in leaves.items()}
    for n, name in enumerate(name for name in leaves if name.endswith("down")):
        made[name] = random_down(jax.random.fold_in(key, n), made[name].shape, init)
    return made


def random_down(key: jax.Array, shape: tuple[int, ...], init: Init) -> jax.Array:
    """``[*batch, n, width]``: ``xavier``: uniform in +-sqrt(6 / (n + width)); ``normal``: deviation 0.02; ``kaiming``: +-1/sqrt(n)."""
    if init == "normal":
        return 0.02 * jax.random.normal(key, shape)
    if init == "kaiming":
        return random_a(key, shape)
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def factors(leaves: Mapping[str, jax.Array], prefix: str = "") -> dict[str, jax.Array | None]:
    """The fields of a bottleneck form that are arrays, from leaves of those names."""
    return {name: leaves.get(prefix + name) for name in ("down", "up", "down_bias", "up_bias")}


def check_width(name: str, width: int | None, reduction: float) -> None:
    """Raises a ValueError unless a width, or a reduction that gives one, is positive."""
    if width is not None and width < 1:
        raise ValueError(f"{name}(width={width}): expected a width of at least 1, or None to take it from `reduction`.")
    if not reduction > 0:
        raise ValueError(f"{name}(reduction={reduction}): expected a positive reduction rate.")


def width_at(name: str, site: Site, position: Position, width: int | None, reduction: float) -> int:
    """The width at a site: ``round(n_source / reduction)`` where it is not given.

    Raises:
      ValueError: a reduction that leaves nothing; names the site.
    """
    if width is not None:
        return width
    n = {"in": site.n_in, "out": site.n_out}[_SIDES[position][0]]
    if round(n / reduction) < 1:
        raise ValueError(
            f"{name} at {site.path}: reduction={reduction} of {n} features leaves a width of 0. Take a smaller reduction, give a width, "
            "or exclude the site."
        )
    return round(n / reduction)
