"""RandLoRA: a full-rank update, a sum of frozen random products scaled by trained vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import seeded
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Entries, Leaf, RandomBases
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    check_rank,
    method,
    scaling,
)
from lowrank_jax.sites import Site


@method
def randlora(
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    entries: Literal["uniform", "sparse", "very_sparse"] = "uniform",
    store: bool = False,
    at_once: int = 128,
) -> Method:
    """RandLoRA: Full-rank parameter-efficient fine-tuning of large models (arXiv 2502.00987).

    ``y = x K + s * x t`` with ``t = sum_j b_j diag(lam_j) a diag(gam_j)`` ``[d, m]``, or its transpose where ``n_in <= n_out``; m is the
    smaller of n_in and n_out, d the larger, and j runs over the ``n = ceil(m / r)`` bases that full rank takes. ``a [r, m]`` and
    ``b_j [d, r]`` are random, frozen and common to all weights, which take the corner that fits them; ``lam [n, r]`` (zero at first)
    and ``gam [n, m]`` (1 / max(n, m)) are trained.
    Count: ``n (r + m)``, about ``m + m^2 / r``: a larger rank means fewer parameters. Use it where low rank is what limits LoRA and a
    slower step is acceptable.

    ``a`` and ``b_j`` are not stored but made of a seed at every use, ``at_once`` directions at a time, and no dense update is formed in
    either pass. The price: ``n r >= m`` directions are as many multiplications as the dense weight's or more, and the backward pass
    makes them again, so no implementation is within 1.25 times LoRA's step. The input is kept for the backward pass, as LoRA keeps it.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes 20 r, as PEFT's defaults do. dropout: on the input of this path, during training.
      entries: of ``a`` and ``b_j``, of variance one. ``uniform``; ``sparse``: a third not zero, of one size; ``very_sparse``: 1 / sqrt(m).
      store: keep ``a [r, m]`` and ``b [d, n, r]`` as leaves instead of the seed, for adapters of PEFT, whose generator cannot be run
        here. They pair as there: ``b`` of a weight, flattened over its last two axes, has direction k of base j at ``k n + j``.
        A scanned stack then holds a copy for each of its layers during a step.
      at_once: how many directions are multiplied at a time, at least one base: memory against speed.

    Raises:
      ValueError: an unknown choice, ``at_once`` below 1, or (at a site) a rank above its smaller dimension.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.ones((96, 64))}}
      >>> [lr.plan(params, {"x": randlora(rank=r)}).trainable for r in (4, 16)]
      [1088, 320]
    """
    check_choice("randlora", "entries", entries, ("uniform", "sparse", "very_sparse"))
    check_dropout("randlora", dropout)
    scale = scaling(rank, 20 * rank if alpha is None else alpha)
    if at_once < 1:
        raise ValueError(f"randlora(at_once={at_once}): expected at least 1.")

    def bases(m: int) -> int:
        return -(-m // rank)

    def side(site: Site) -> Literal["in", "out"]:
        return "in" if site.n_in <= site.n_out else "out"

    def drawn(m: int) -> Entries:
        if entries == "uniform":
            return Entries(3**0.5, 3**0.5)
        density = 1 / 3 if entries == "sparse" else m**-0.5
        return Entries(density**-0.5, density**-0.5, density)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("randlora", rank, site)
        n, m = bases(site.max_rank), site.max_rank
        return {"lam": Leaf((n, rank), ("", "rank")), "gam": Leaf((n, m), ("", side(site)))}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        shapes = {name: (*site.batch_shape, *leaf.shape) for name, leaf in leaves(site).items()}
        return {"lam": jnp.zeros(shapes["lam"]), "gam": jnp.full(shapes["gam"], 1 / max(shapes["gam"][-2:]))}

    def shared(sites: tuple[Site, ...]) -> dict[str, Leaf]:
        if not store:
            return {"seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32)}
        m, d = max(s.max_rank for s in sites), max(max(s.n_in, s.n_out) for s in sites)
        frozen = {"a": (rank, m), "b": (d, bases(m), rank)}
        return {name: Leaf(shape, ("",) * len(shape), trains=None) for name, shape in frozen.items()}

    def init_shared(key: jax.Array, sites: tuple[Site, ...]) -> Leaves:
        seed, found = seeded.seeds(key), shared(sites)
        if not store:
            return {"seed": seed}
        how = drawn(found["a"].shape[1])
        return {
            "a": how.draw("narrow", seeded.fold(seed, 1), found["a"].shape),
            "b": how.draw("wide", seeded.fold(seed, 0), found["b"].shape),
        }

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> RandomBases:
        d, m, n = max(site.n_in, site.n_out), site.max_rank, bases(site.max_rank)
        kept = dict(context.shared)
        if store:
            kept["a"] = kept["a"][:, :m]
            kept["b"] = jnp.swapaxes(kept["b"][:d, :n].reshape(d, rank, n), 1, 2)
        kept = {name: jnp.broadcast_to(part, (*site.batch_shape, *part.shape)) for name, part in kept.items()}
        return RandomBases(
            leaves["lam"],
            leaves["gam"],
            kept.get("seed"),
            kept.get("b"),
            kept.get("a"),
            d=d,
            side=side(site),
            entries=drawn(m),
            at_once=at_once,
            scale=scale,
            dropout=dropout,
        )

    return Method(RandomBases, leaves, init, expand, shared=shared, init_shared=init_shared)
