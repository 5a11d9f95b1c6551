"""Ranks for the sites of a plan, in proportion to a score of each layer, under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lowrank_jax.allocate import Item, allocate
from lowrank_jax.methods.ranks import Rank, of_stack
from lowrank_jax.sites import Site

Budget = Literal["rank", "core", "parameters"]
Compare = Literal["shape", "all"]


def site_ranks(
    sites: Mapping[str, Site],
    scores: Mapping[str, Any],
    rank: int,
    budget: Budget = "rank",
    compare: Compare = "all",
    candidates: Sequence[int] | None = None,
) -> dict[str, Rank]:
    """The ``rank`` field of every site.

    Args:
      scores: ``{path: [*batch]}``, at least 0. rank: the mean, whose uniform use defines the budget; ranks lie between a quarter and
        twice of it.
      budget: what is held: ``rank``: the sum of r, spent exactly; ``core``: the sum of r^2; ``parameters``: the sum of r (n_in +
        n_out), never exceeded. compare: ``shape`` shares a budget out among weights of equal shape only.
      candidates: the ranks to choose from; None: every one in between.
    """
    groups: dict[tuple[int, int] | None, list[Item]] = {}
    for path, site in sites.items():
        for layer, score in enumerate(scores[path].reshape(-1).tolist()):
            item = Item(f"{path}\0{layer:06d}", score, site.max_rank, _cost(budget, site))
            groups.setdefault((site.n_in, site.n_out) if compare == "shape" else None, []).append(item)
    ranks: dict[str, int] = {}
    for items in groups.values():
        ranks |= allocate(items, rank, max(1, rank // 4), 2 * rank, candidates)
    return {
        path: of_stack([ranks[f"{path}\0{layer:06d}"] for layer in range(scores[path].size)], site)
        for path, site in sites.items()
    }


def _cost(budget: Budget, site: Site) -> Callable[[float], float]:
    return {
        "rank": lambda r: r,
        "core": lambda r: r * r,
        "parameters": lambda r: r * (site.n_in + site.n_out),
    }[budget]
