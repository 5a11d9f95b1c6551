"""What methods share whose update is a sum of weighted directions, ``s * a diag(e) b``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.forms import Leaf
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Leaves, Method, check_rank
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.ranks import of_stack
from lowrank_jax.sites import Site


def triplet_leaves(name: str, rank: int, site: Site) -> dict[str, Leaf]:
    """The descriptions of ``a [n_in, r]``, ``e [r]`` and ``b [r, n_out]``, all trained; a ValueError where the rank does not fit."""
    check_rank(name, rank, site)
    return {"a": a_leaf(site, rank), "e": Leaf((rank,), ("rank",)), "b": b_leaf(site, rank)}


def check_betas(name: str, betas: tuple[float, float]) -> None:
    """Raises a ValueError unless both are in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{name}(betas={betas}): expected two numbers in [0, 1).")


def normal_factors(key: jax.Array, site: Site, rank: int, deviation: float = 0.02) -> Leaves:
    """Both factors normal, as AdaLoRA starts."""
    shapes = {"a": (*site.batch_shape, site.n_in, rank), "b": (*site.batch_shape, rank, site.n_out)}
    return {n: deviation * jax.random.normal(jax.random.fold_in(key, k), s) for k, (n, s) in enumerate(shapes.items())}


def gram_errors(leaves: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``a^T a - I`` and ``b b^T - I``, ``[*batch, r, r]`` float32 each."""
    a, b = (leaves[name].astype(jnp.float32) for name in ("a", "b"))
    one = jnp.eye(a.shape[-1])
    return jnp.einsum("...ir,...is->...rs", a, a) - one, jnp.einsum("...ro,...so->...rs", b, b) - one


def orthogonality(sites: Mapping[str, Mapping[str, jax.Array]], used: Mapping[str, Any] | None = None) -> jax.Array:
    """The mean of ``||a^T a - I||_F^2`` and ``||b b^T - I||_F^2`` over all sites and layers.

    A sum would grow with the model and drown the task's gradient, in the importance of directions too.

    Args:
      used: ``{path: [*batch, r]}`` bool, the directions that count; None: all.
    """
    total, number = jnp.float32(0), 0
    for path, leaves in sites.items():
        for error in gram_errors(leaves):
            if used is not None:
                error = jnp.where(used[path][..., None] & used[path][..., None, :], error, 0)
            total, number = total + (error**2).sum(), number + error[..., 0, 0].size
    return total / number


def without_zeros(site: Site, a: Any, e: Any, b: Any, scale: float) -> tuple[Method, dict[str, Any]]:
    """The LoRA that acts like ``scale * a diag(e) b``: directions with ``e = 0`` dropped, the rest in order, ``e`` moved into ``b``.

    The scale stays what it was, whatever rank is left. A layer keeps at least one direction (a zero one), and a stack is padded
    with zeros to its largest rank.
    """
    e = e.reshape(-1, e.shape[-1])
    a, b = (x.reshape(len(e), *x.shape[-2:]) for x in (a, b))
    ranks = np.maximum((e != 0).sum(-1), 1)
    rank = int(ranks.max())
    # A stable sort on "is zero" brings what is left to the front in its own order.
    order = np.argsort(e == 0, axis=-1, kind="stable")[:, :rank]
    kept = np.take_along_axis(e, order, -1)
    a = np.take_along_axis(a, order[:, None, :], -1) * (kept != 0)[:, None, :]
    b = np.take_along_axis(b, order[:, :, None], -2) * kept[:, :, None]
    leaves = {"a": a.reshape(*site.batch_shape, site.n_in, rank), "b": b.reshape(*site.batch_shape, rank, site.n_out)}
    return lora(rank=of_stack(ranks, site), alpha=scale * rank), leaves
