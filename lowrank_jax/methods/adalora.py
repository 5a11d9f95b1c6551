"""AdaLoRA: directions of all weights compete for a rank budget that falls during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    Seen,
    check_dropout,
    method,
    scaling,
)
from lowrank_jax.methods.triplets import (
    check_betas,
    gram_errors,
    normal_factors,
    orthogonality,
    triplet_leaves,
    without_zeros,
)
from lowrank_jax.optim.prune_triplets import Budget, prune_triplets
from lowrank_jax.sites import Site


@method
def adalora(
    rank: int = 12,
    target: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    start: float = 0.1,
    stop: float = 0.5,
    interval: int = 1,
    budget: Budget = "rank",
    orthogonal: float = 0.1,
    betas: tuple[float, float] = (0.85, 0.85),
    compat: Literal["paper", "official"] = "paper",
) -> Method:
    """AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512).

    ``y = x K + s * ((x a) * e) b`` with ``a [n_in, r]``, ``e [r]`` and ``b [r, n_out]`` trained, an SVD in shape: a penalty keeps ``a`` and
    ``b`` near orthonormal, and ``e``, zero at first, plays the singular values. While training goes on the directions of all weights
    are ranked by importance, and ``e`` of the least important is set to zero under a budget that falls from ``rank`` to ``target`` a
    weight on average (see `optim.prune_triplets`). Use it where some layers deserve more rank than others and you do not know which.
    `lowrank_jax.compact` drops what was pruned and leaves a LoRA.
    Count: ``r * (n_in + n_out + 1)`` in training; the sum over layers of ``r_l * (n_in + n_out)`` after compaction.

    Needs `lowrank_jax.penalty` in the loss and `optim.with_methods` around the optimizer. Weight decay on ``e`` shrinks what the
    ranking is made of: leave ``e`` out of it.

    Args:
      rank: r, of every weight at first. target: the mean rank at the end, which defines the budget; None: two thirds of ``rank``.
      alpha: ``s = alpha / r`` with the first r, and stays; None takes alpha = rank. dropout: on the input of this path, in training.
      start, stop: fractions of the run at which the budget begins to fall and is reached; from ``stop`` on the choice is final.
      interval: steps between two prunings.
      budget: ``rank`` keeps exactly ``target`` times the number of weights; ``parameters`` holds the numbers in ``a`` and ``b`` instead,
        where a direction of a wide weight costs more.
      orthogonal: weight of the penalty, the mean of ``||a^T a - I||^2`` and ``||b b^T - I||^2`` over weights (a mean as in the released
        code: summed over weights it decides the ranking alone).
      betas: smoothing of the sensitivity ``|w * dL/dw|`` and of its variation, whose product is the importance.
      compat: ``official`` has the penalty as the released code does: the norms are not squared.

    Raises:
      ValueError: a target above the rank, fractions out of order, an interval below 1, betas outside [0, 1), or (at a site) a rank
        above its smaller dimension.

    Example:
      >>> adalora(rank=6, target=4).exact_init
      True
    """
    check_choice("adalora", "budget", budget, ("rank", "parameters"))
    check_choice("adalora", "compat", compat, ("paper", "official"))
    check_dropout("adalora", dropout)
    scale = scaling(rank, alpha)
    if not 0 <= start < stop <= 1:
        raise ValueError(f"adalora(start={start}, stop={stop}): expected fractions of the run, 0 <= start < stop <= 1.")
    last = max(1, round(2 * rank / 3)) if target is None else target
    if not 1 <= last <= rank:
        raise ValueError(f"adalora(target={target}): expected a mean rank between 1 and the first rank, {rank}.")
    if interval < 1:
        raise ValueError(f"adalora(interval={interval}): expected at least one step.")
    check_betas("adalora", betas)

    def leaves(site: Site) -> dict[str, Leaf]:
        return triplet_leaves("adalora", rank, site)

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        return {**normal_factors(key, site, rank), "e": jnp.zeros((*site.batch_shape, rank))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], leaves["e"], scale=scale, dropout=dropout)

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        if compat == "paper":
            return orthogonal * orthogonality({path: s.leaves for path, s in seen.items()})
        errors = [error.reshape(-1, rank * rank) for s in seen.values() for error in gram_errors(s.leaves)]
        return orthogonal * optax.safe_norm(jnp.concatenate(errors), 0.0, axis=-1).mean()

    def transform(total_steps: int) -> optax.GradientTransformation:
        return prune_triplets(last, start * total_steps, stop * total_steps, interval, budget, betas)

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        return without_zeros(site, leaves["a"], leaves["e"], leaves["b"], scale)

    return Method(
        LowRank,
        leaves,
        init,
        expand,
        transform=transform,
        penalty=penalty if orthogonal else None,
        compact=compact,
    )
