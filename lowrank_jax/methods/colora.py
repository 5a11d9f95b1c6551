"""CoLoRA: LoRA whose ranks follow how much each layer contributes to the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lowrank_jax.checks import check_choice
from lowrank_jax.methods.allocation import site_ranks
from lowrank_jax.methods.base import Given, Method, method, scaling
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.ranks import largest
from lowrank_jax.sites import Site


@method
def colora(
    rank: int = 16,
    alpha: float | None = None,
    budget: Literal["rank", "parameters"] = "parameters",
    candidates: Sequence[int] | None = None,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dropout: float = 0.0,
) -> Method:
    """CoLoRA: Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration (arXiv 2408.01099).

    LoRA whose rank at each layer is proportional to the layer's contribution: its integrated gradients of the loss along the line from
    the base to a model that was fully fine-tuned on the task. Needs the statistic ``contribution`` (`lowrank_jax.contributions`) when the
    plan is made, and so one fully tuned model; use it where many adapters for similar tasks follow. Convolutions count as matrices.
    Count: ``sum of r_l * (n_in + n_out)``.

    The paper's factor between contribution and rank was not at hand: proportional ranks under an exact budget are a reconstruction.

    Args:
      rank: the mean rank, which defines the budget: what LoRA of this rank everywhere would use.
      alpha: ``s = alpha / r`` with the mean rank, the same at all layers; None takes alpha = rank.
      budget: what is held: ``rank``: the sum of r, spent exactly; ``parameters``: the sum of r (n_in + n_out), never exceeded.
      candidates: the ranks to choose from; None: every rank from rank/4 to 2 rank. init, dropout: as in `lora`.

    Raises:
      ValueError: an unknown choice or a rank below 1; statistics that were not collected, by name.

    Example:
      >>> sorted(colora(rank=4).needs)
      ['contribution']
    """
    check_choice("colora", "budget", budget, ("rank", "parameters"))
    if rank < 1:
        raise ValueError(f"colora(rank={rank}): expected a mean rank of at least 1.")
    scale = scaling(rank, alpha)
    of_rank = lambda r: lora(r, scale * largest(r), init, dropout=dropout)  # noqa: E731
    uniform = of_rank(rank)

    def choose(sites: Mapping[str, Site], given: Mapping[str, Given]) -> dict[str, Method]:
        scores = {path: g.need("contribution") for path, g in given.items()}
        return {path: of_rank(own) for path, own in site_ranks(sites, scores, rank, budget, "all", candidates).items()}

    return Method(
        uniform.form, uniform.leaves, uniform.init, uniform.expand, allocate=choose, needs=frozenset({"contribution"})
    )
