"""GaLore: any optax transform, run in the leading singular directions of each matrix's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import optax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice, check_numbers
from lowrank_jax.optim.projected import OnRefresh, Space, quantised, run_projected
from lowrank_jax.optim.subspace import REFRESH_ITERATIONS, Side, singular_directions
from lowrank_jax.sites import Site


def galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    scale: float = 0.25,
    refresh_every: int = 200,
    targets: Sequence[str] | None = None,
    sites: Mapping[str, Site] | None = None,
    allow_other: bool = False,
    side: Side = "smaller",
    svd: linalg.SvdMethod = "randomized",
    power_iterations: int = REFRESH_ITERATIONS,
    on_refresh: OnRefresh = "keep",
    stagger: bool = True,
    quantise_subspace: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (arXiv 2403.03507).

    A weight ``W [*batch, n_in, n_out]`` with gradient ``G`` is updated by ``scale * P inner(P^T G)``, where ``P [*batch, n_in, r]`` holds
    the leading singular directions of the gradient at the last refresh (``inner(G Q) Q^T`` where the output side is projected). The
    inner state is as large as ``P^T G``; with Adam ``2 r max(n_in, n_out) + r min(n_in, n_out)`` numbers a matrix instead of
    ``2 n_in n_out``. Every layer of a scanned stack and every expert has a subspace of its own. On a mesh ``P`` and the inner state are
    divided as the weight is (made by ``init`` from the weights where they lie). Leaves that are not targeted are
    updated by ``inner`` as they are.

    Weight decay and the learning rate belong outside, where the weight is whole::

        optax.chain(galore(optax.scale_by_adam(), rank=128), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.01))

    The inner transform is run on each weight alone, so one that looks across weights (a global norm) belongs outside too. Paper and
    official code differ from optax's own GaLore, which projects the longer side: ``side="larger"`` is that.

    Args:
      inner: such as ``optax.scale_by_adam()``; it must not need the parameters.
      rank: r, at most the smaller dimension. scale: the paper's alpha, of projected updates only.
      refresh_every: T, updates between two refreshes of a weight.
      targets: patterns of weights (see `lowrank_jax.plan`); None: every dense weight and convolution that `lowrank_jax.sites` finds.
      sites: of the parameters, where they alone do not tell, such as `lowrank_jax.linen.sites` finds; None: `lowrank_jax.sites`.
      allow_other: hand a targeted leaf that is no matrix to ``inner`` instead of refusing it.
      side: which side of the matrix is projected, see `lowrank_jax.optim.subspace.sides`.
      svd: ``randomized`` (range finder) or ``exact``. power_iterations: of the former; more find more of the gradient's energy where its
        spectrum decays slowly, as in wide layers (`bench.refresh_time`).
      on_refresh: what becomes of the inner state: ``keep`` (paper and code: the old moments go on, in the new subspace's coordinates),
        ``reset`` (starts anew, its counter too), ``rotate`` (first moments are turned into the new subspace, second ones by the
        squares, which is an approximation and not in the paper).
      stagger: spreads the refreshes over ``refresh_every`` steps, weight by weight, so that after the first step none does them all.
        False: all at steps 0, T, 2T, as the official code does.
      quantise_subspace: keep ``P`` in eight bits a number (block-wise dynamic, about 1% error); 8-bit moments are an inner transform of
        their own, `lowrank_jax.optim.scale_by_adam_8bit`.
      seed: of the sketches.

    Raises:
      ValueError: at once, a rank, period or name out of range; from ``init``, a rank above a weight's smaller dimension, a target that
        matches nothing or is no matrix (by path); from ``update``, a state of other weights, an inner transform that needs parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"layer": {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}}
      >>> tx = optax.chain(galore(optax.scale_by_adam(), rank=2), optax.scale_by_learning_rate(1e-2))
      >>> state = tx.init(params)
      >>> state[0].projected["layer/kernel"].inner.mu.shape, state[0].rest.mu["layer/bias"].shape
      ((2, 8), (8,))
    """
    check_numbers("galore", rank=rank, refresh_every=refresh_every)
    check_choice("galore", "side", side, get_args(Side))
    check_choice("galore", "on_refresh", on_refresh, get_args(OnRefresh))
    check_choice("galore", "svd", svd, get_args(linalg.SvdMethod))

    def space(site: Site) -> Space:
        if rank > site.max_rank:
            raise ValueError(
                f"galore(rank={rank}) at {site.path}: a [{site.n_in}, {site.n_out}] gradient has only {site.max_rank} singular directions. "
                "Choose a smaller rank, or leave the weight out of targets."
            )
        directions = singular_directions(rank, side, svd, power_iterations)
        return quantised(directions) if quantise_subspace else directions

    return run_projected(
        "galore", inner, space, scale=scale, free=None, refresh_every=refresh_every, on_refresh=on_refresh, stagger=stagger,
        by_size=False, targets=targets, sites=sites, allow_other=allow_other, seed=seed,
    )  # fmt: skip
