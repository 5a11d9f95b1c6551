"""SoRA: a LoRA whose directions have gates, drawn to exactly zero by a proximal step."""

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
    random_a,
    scaling,
)
from lowrank_jax.methods.triplets import triplet_leaves, without_zeros
from lowrank_jax.optim.soft_threshold import Schedule, soft_threshold, threshold_stages
from lowrank_jax.sites import Site


@method
def sora(
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    threshold: float = 1e-3,
    first: float = 0.0,
    stages: int = 1,
    schedule: Schedule = "linear",
    l1: float = 0.0,
    compat: Literal["paper", "official"] = "paper",
) -> Method:
    """SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models (arXiv 2311.11696).

    ``y = x K + s * ((x a) * e) b`` with ``a [n_in, r]``, gates ``e [r]`` and ``b [r, n_out]`` trained; ``b`` is zero at first, the gates
    are normal with deviation 1. After every update the gates are drawn towards zero by ``threshold`` and stop there exactly
    (see `optim.soft_threshold`); one that is zero comes back if its gradient is strong enough. Use it to find how much rank a
    task needs by a penalty instead of a budget. `lowrank_jax.compact` drops the closed directions and leaves a LoRA with the
    same s.
    Count: ``r * (n_in + n_out + 1)`` in training, ``r_l * (n_in + n_out)`` after compaction, with r_l open gates.

    Needs `optim.with_methods` around the optimizer. Weight decay is a second shrinkage: leave the gates out of it.

    Args:
      rank: r, the most that a weight can have. alpha: ``s = alpha / r``, whatever is left of r; None takes alpha = rank.
      dropout: on the input of this path, during training.
      threshold: how far a gate is drawn at each update, i.e. the learning rate times the weight of the L1 norm. An update moves a gate
        by about the learning rate, so it has to be well below that for anything to stay open.
      first, stages, schedule: with more than one stage the threshold rises from ``first`` to ``threshold`` over as many equal stretches of
        the run: ``linear``, or equally spaced after exp (``log_linear``) or log (``exp_linear``). The paper trains a stage to its end
        before the next; here they share one run.
      l1: weight of the mean of ``|e|`` over all gates, which the released code adds to the loss besides the proximal step.
      compat: ``official`` zeroes whatever is below the threshold after it was drawn, as the released code does.

    Raises:
      ValueError: a negative threshold, no stage, an unknown choice, or (at a site) a rank above its smaller dimension.

    Example:
      >>> sora(rank=4, threshold=1e-4).exact_init
      True
    """
    check_choice("sora", "schedule", schedule, ("linear", "log_linear", "exp_linear"))
    check_choice("sora", "compat", compat, ("paper", "official"))
    check_dropout("sora", dropout)
    for name, value in (("threshold", threshold), ("first", first), ("l1", l1)):
        if value < 0:
            raise ValueError(f"sora({name}={value}): expected a number of at least 0.")
    if stages < 1:
        raise ValueError(f"sora(stages={stages}): expected at least one stage.")
    if stages > 1 and schedule == "exp_linear" and not first > 0:
        raise ValueError(f"sora(first={first}): expected more than 0, from which exp_linear can rise.")
    scale = scaling(rank, alpha)

    def leaves(site: Site) -> dict[str, Leaf]:
        return triplet_leaves("sora", rank, site)

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a_key, e_key = jax.random.split(key)
        return {
            "a": random_a(a_key, (*site.batch_shape, site.n_in, rank)),
            "e": jax.random.normal(e_key, (*site.batch_shape, rank)),
            "b": jnp.zeros((*site.batch_shape, rank, site.n_out)),
        }

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], leaves["e"], scale=scale, dropout=dropout)

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        gates = jnp.concatenate([s.leaves["e"].astype(jnp.float32).reshape(-1) for s in seen.values()])
        return l1 * jnp.abs(gates).mean()

    def transform(total_steps: int) -> optax.GradientTransformation:
        levels = threshold_stages(first, threshold, stages, schedule)
        return soft_threshold("e", levels, total_steps, "jump" if compat == "official" else "soft")

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        return without_zeros(site, leaves["a"], leaves["e"], leaves["b"], scale)

    return Method(LowRank, leaves, init, expand, transform=transform, penalty=penalty if l1 else None, compact=compact)
