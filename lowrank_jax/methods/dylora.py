"""DyLoRA: a LoRA that is good at every rank up to its own after one training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    check_rank,
    method,
    random_a,
    scaling,
)
from lowrank_jax.methods.lora import lora
from lowrank_jax.optim.update_used import update_used
from lowrank_jax.sites import Site


@method
def dylora(
    rank: int = 8, alpha: float | None = None, dropout: float = 0.0, frozen: bool = True, at: int | None = None
) -> Method:
    """DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low Rank Adaptation (arXiv 2210.07558).

    ``y = x K + alpha / q * (x a[:, :q]) b[:q]`` with ``a [n_in, r]`` and ``b [r, n_out]`` as in LoRA. Each training step draws one q
    uniformly from 1..r, the same at every site, so the leading directions learn to do without the later ones. Use it when the
    rank to deploy is not known yet: `lowrank_jax.at_rank` picks one after training, as often as you like, and `lowrank_jax.compact`
    then leaves a LoRA of that rank.
    Count: ``r * (n_in + n_out)``; deployed ``q * (n_in + n_out)``.

    A step is a training step where the call has a dropout key (``rngs={"dropout": key}``); without one the rank is ``at``. Needs
    `optim.with_methods` around the optimizer, which leaves the directions outside the step alone, momentum and weight decay included.
    The rank is masked, not cut, so one compiled step serves all of them; it costs what the full rank costs.

    Args:
      rank: r, the largest rank. alpha: ``s = alpha / q`` at rank q; None takes alpha = rank.
      dropout: on the input of this path, during training.
      frozen: a step trains its last direction only, q, and the ones before it act but stay; False trains all of them.
      at: the rank outside training; None: all of it.

    Raises:
      ValueError: ``at`` outside 1..rank, or (at a site) a rank above its smaller dimension.

    Example:
      >>> dylora(rank=8, at=2).exact_init
      True
    """
    check_dropout("dylora", dropout)
    alpha = rank * scaling(rank, alpha)
    deployed = rank if at is None else at
    if not 1 <= deployed <= rank:
        raise ValueError(f"dylora(at={at}): expected a rank between 1 and {rank}.")

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("dylora", rank, site)
        return {"a": a_leaf(site, rank), "b": b_leaf(site, rank)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a = random_a(key, (*site.batch_shape, site.n_in, rank))
        return {"a": a, "b": jnp.zeros((*site.batch_shape, rank, site.n_out))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        a, b = leaves["a"], leaves["b"]
        if context.key is None:
            return LowRank(a[..., :deployed], b[..., :deployed, :], scale=alpha / deployed, dropout=dropout)
        # The key as it is, without the site's path: one draw for the whole model.
        last = jax.random.randint(context.key, (), 0, rank)
        direction = jnp.arange(rank)
        if frozen:
            trains = direction == last
            a = jnp.where(trains, a, jax.lax.stop_gradient(a))
            b = jnp.where(trains[:, None], b, jax.lax.stop_gradient(b))
        weight = (direction <= last) * (rank / (last + 1.0))
        return LowRank(a, b, jnp.broadcast_to(weight, (*site.batch_shape, rank)), scale=alpha / rank, dropout=dropout)

    def transform(total_steps: int) -> optax.GradientTransformation:
        return update_used({"a": -1, "b": -2})

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        each = lora(rank=deployed, alpha=alpha)
        return each, {"a": leaves["a"][..., :deployed], "b": leaves["b"][..., :deployed, :]}

    return Method(LowRank, leaves, init, expand, transform=transform, compact=compact)
