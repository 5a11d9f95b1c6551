"""IncreLoRA: weights start with a rank of one and the important ones grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.methods.base import Context, Given, Leaves, Method, Seen, check_dropout, method, scaling
from lowrank_jax.methods.triplets import check_betas, normal_factors, orthogonality, triplet_leaves, without_zeros
from lowrank_jax.optim.grow_triplets import RESERVE, grow_triplets
from lowrank_jax.sites import Site


@method
def increlora(
    rank: int = 12,
    target: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    first: int = 1,
    gain: int | None = None,
    top: int = 2,
    start: float = 0.1,
    stop: float = 0.5,
    ramp: float = 0.02,
    orthogonal: float = 0.1,
    betas: tuple[float, float] = (0.85, 0.85),
) -> Method:
    """IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (arXiv 2308.12043).

    ``y = x K + alpha / active * ((x a) * e) b`` with ``a [n_in, r]``, ``e [r]`` and ``b [r, n_out]``, of which a weight uses the first
    ``active``. While training goes on the most important weights get more of them, until the mean is ``target``; ``e`` of the next
    ``gain`` is held at 1e-5 meanwhile, so that their factors have learnt when they are handed over (see `optim.grow_triplets`).
    Use it where a few weights deserve much more rank than the rest. `lowrank_jax.compact` leaves a LoRA.
    Count: ``r * (n_in + n_out + 1)`` held; in use ``active_l * (n_in + n_out + 1)``, at the end ``target`` directions a weight on average.

    Under jit shapes are fixed: ``rank`` slots are there from the start, and those beyond the reserve have no gradient and do not move.
    The importance of a weight is estimated without its dense gradient, and a new direction's own warm-up stands in for optimizer
    moments that start with it: both are approximations, see `optim.grow_triplets`. Needs `lowrank_jax.penalty` in the loss
    and `optim.with_methods` around the optimizer.

    Args:
      rank: r, the most that a weight can have. target: the mean rank at the end; None: half of ``rank``.
      alpha: ``s = alpha / active``; None takes alpha = target. dropout: on the input of this path, during training.
      first: active directions of every weight at first.
      gain: by how many a weight grows at once; None: half of ``target``, as in the paper.
      top: how many weights grow in a round.
      start, stop: fractions of the run between which the rounds that this takes are evenly spread.
      ramp: fraction of the run over which the updates of a new direction rise to their full size.
      orthogonal: weight of the penalty, the mean over weights of ``||a^T a - I||^2`` and ``||b b^T - I||^2`` of the directions in use or
        in reserve.
      betas: smoothing of the importance and of its variation.

    Raises:
      ValueError: ranks or fractions out of order, a gain or top below 1, betas outside [0, 1), or (at a site) a rank above its smaller
        dimension.

    Example:
      >>> increlora(rank=8, target=4).exact_init
      False
    """
    check_dropout("increlora", dropout)
    scaling(rank, alpha)  # refuses a rank below 1; the scale itself follows the rank in use
    last = max(1, rank // 2) if target is None else target
    more = max(1, last // 2) if gain is None else gain
    if not 1 <= last <= rank:
        raise ValueError(f"increlora(target={target}): expected a mean rank between 1 and {rank}.")
    if not 1 <= first <= last:
        raise ValueError(f"increlora(first={first}): expected a rank between 1 and the target, {last}.")
    for name, value in (("gain", more), ("top", top)):
        if value < 1:
            raise ValueError(f"increlora({name}={value}): expected at least 1.")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"increlora(start={start}, stop={stop}): expected fractions, 0 <= start < stop <= 1.")
    if ramp < 0:
        raise ValueError(f"increlora(ramp={ramp}): expected a fraction of the run.")
    check_betas("increlora", betas)
    alpha = last if alpha is None else alpha

    def leaves(site: Site) -> dict[str, Leaf]:
        active = Leaf((1,), ("",), state=True, dtype=jnp.float32)
        return {**triplet_leaves("increlora", rank, site), "active": active}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        slot = jnp.arange(rank)
        e = jnp.where((slot >= first) & (slot < first + more), RESERVE, 0.0)
        e = jnp.broadcast_to(e, (*site.batch_shape, rank))
        return {**normal_factors(key, site, rank), "e": e, "active": jnp.full((*site.batch_shape, 1), float(first))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        active, e = jax.lax.stop_gradient(leaves["active"]), leaves["e"]
        e = jnp.where(jnp.arange(rank) < active, e, jax.lax.stop_gradient(e))
        return LowRank(leaves["a"], leaves["b"], e / active, scale=alpha, dropout=dropout)

    def regular(leaves: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        in_use = {p: (jnp.arange(rank) < x["active"]) | (x["e"] != 0) for p, x in leaves.items()}
        return orthogonal * orthogonality(leaves, in_use)

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        return regular({path: s.leaves for path, s in seen.items()})

    def transform(total_steps: int) -> optax.GradientTransformation:
        return grow_triplets(
            last, first, more, top, start * total_steps, stop * total_steps, ramp * total_steps, betas,
            regular if orthogonal else None,
        )  # fmt: skip

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        return without_zeros(site, leaves["a"], leaves["e"] / leaves["active"], leaves["b"], alpha)

    # The reserve acts from the start, as 1e-5 of a direction.
    return Method(
        LowRank,
        leaves,
        init,
        expand,
        transform=transform,
        penalty=penalty if orthogonal else None,
        compact=compact,
        exact_init=False,
    )
