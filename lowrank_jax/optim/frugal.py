"""FRUGAL: an optimizer with state in a part of each gradient, and one without state for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice, check_numbers
from lowrank_jax.optim.coordinates import Order, some_entries, some_inputs, some_matrices, some_outputs
from lowrank_jax.optim.projected import Space, run_projected
from lowrank_jax.optim.subspace import (
    Bases,
    Side,
    bases_space,
    projected_size,
    sides,
    singular_directions,
)
from lowrank_jax.sites import Site

Subspace = Literal["svd", "random", "inputs", "outputs", "entries", "blocks"]
Free = Literal["sign", "sgd"]


def frugal(
    inner: optax.GradientTransformation,
    density: float = 0.25,
    subspace: Subspace = "inputs",
    *,
    free: Free | None = "sign",
    free_scale: float = 1.0,
    scale: float = 1.0,
    refresh_every: int = 200,
    on_refresh: Literal["reset", "keep"] = "reset",
    order: Order = "random",
    side: Side = "smaller",
    svd: linalg.SvdMethod = "randomized",
    targets: Sequence[str] | None = None,
    sites: Mapping[str, Site] | None = None,
    allow_other: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training (arXiv 2411.07837).

    The gradient ``G [*batch, n_in, n_out]`` of a weight is split into a part in a subspace of the given density, which ``inner`` (Adam)
    updates with state, and the rest, which is updated by its sign and has none:
    ``scale * up(inner(down(G))) + free_scale * sign(G - up(down(G)))``. Every refresh chooses another subspace. The state is ``density`` of
    the inner transform's, and the update is of full rank. Leaves that are not targeted (embeddings, norms) are updated by ``inner``.

    As with `galore`, learning rate and weight decay are chained after it.

    Args:
      inner: such as ``optax.scale_by_adam()``; it must not need the parameters.
      density: share of the state that is kept, in [0, 1].
      subspace: ``inputs``, ``outputs``, ``entries``: features or single entries of each matrix, drawn anew each time; ``blocks``: whole
        matrices (layers of a stack and weights of a size are drawn from together; the paper draws from all tensors, which under jit would
        need room for the largest); ``svd``: the gradient's singular directions as in GaLore; ``random``: random orthonormal directions.
      free: ``sign``, ``sgd``, or None: the rest is not updated. free_scale: its learning rate over that of ``inner``; the paper takes 1 for
        pre-training and 0.1 for fine-tuning.
      scale: of the part with state. refresh_every: T, updates between two choices.
      on_refresh: ``reset`` the state, its counter too (the paper), or ``keep`` it.
      order: of ``blocks``: ``random``, ``ascending``, ``descending``, or ``mirror`` (from both ends; needs an even number).
      side, svd: of ``svd`` and ``random``, see `galore`.
      targets, sites, allow_other, seed: see `galore`.

    Raises:
      ValueError: a field out of range or unknown; from ``init``, a target that matches nothing or is no matrix (by path), an odd number of
        blocks for ``mirror``; from ``update``, a state of other weights, an inner transform that needs parameters.

    Example:
      >>> params = {"layer": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}
      >>> state = frugal(optax.scale_by_adam(), density=0.25).init(params)
      >>> state.projected["layer/kernel"].inner.mu.shape
      (2, 6)
    """
    check_numbers("frugal", refresh_every=refresh_every)
    for name, value, known in (
        ("subspace", subspace, get_args(Subspace)), ("free", free, (*get_args(Free), None)), ("order", order, get_args(Order)),
        ("on_refresh", on_refresh, ("reset", "keep")), ("side", side, get_args(Side)), ("svd", svd, get_args(linalg.SvdMethod)),
    ):  # fmt: skip
        check_choice("frugal", name, value, known)
    if not 0 <= density <= 1:
        raise ValueError(f"frugal(density={density}): expected a share in [0, 1].")

    def space(site: Site) -> Space:
        if subspace == "blocks":
            return some_matrices(density, order)
        if subspace in ("svd", "random"):
            rank = round(density * projected_size(side, site.n_in, site.n_out))
            if subspace == "random" or not rank:
                return bases_space(rank, side, lambda g, key: _random_bases(g, rank, side, key))
            return singular_directions(min(rank, site.max_rank), side, svd)
        return {"inputs": some_inputs, "outputs": some_outputs, "entries": some_entries}[subspace](density)

    rest = None
    if free is not None:
        rest = lambda g: free_scale * (jnp.sign(g) if free == "sign" else g)  # noqa: E731
    return run_projected(
        "frugal", inner, space, scale=scale, free=rest, refresh_every=refresh_every, on_refresh=on_refresh, stagger=False,
        by_size=subspace == "blocks", targets=targets, sites=sites, allow_other=allow_other, seed=seed,
    )  # fmt: skip


def _random_bases(g: jax.Array, rank: int, side: Side, key: jax.Array) -> Bases:
    def basis(n: int, key: jax.Array) -> jax.Array:
        return linalg.qr(jax.random.normal(key, (*g.shape[:-2], n, rank)))[0]

    inputs, outputs = sides(side, *g.shape[-2:])
    first, second = jax.random.split(key)
    return Bases(basis(g.shape[-2], first) if inputs else None, basis(g.shape[-1], second) if outputs else None)
