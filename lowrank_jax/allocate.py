"""Sharing a rank budget out among weights, from one score for each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One weight (or one layer of a stack) that asks for a rank.

    Attributes:
      name: breaks ties, so that the result does not depend on the order given.
      score: ranks are proportional to it; not negative.
      limit: the largest rank that fits.
      cost: ``rank -> cost`` in the budget's unit, increasing; also defined between whole ranks.
    """

    name: str
    score: float
    limit: int
    cost: Callable[[float], float]


def allocate(
    items: Sequence[Item], target: int, lowest: int, highest: int, candidates: Sequence[int] | None = None
) -> dict[str, int]:
    """Ranks in proportion to the scores, under the budget of giving ``target`` to everyone.

    The proportion that spends the budget is found by bisection with every rank kept in ``[lowest, highest]`` and under its limit;
    ranks are rounded down, and what is left goes where rounding took most. Equal scores give equal ranks, a higher score never a
    lower rank (limits aside).

    Args:
      target: the rank whose uniform use defines the budget.
      candidates: the ranks to choose from; None: every whole number.

    Returns:
      ``{name: rank}``. The total cost never exceeds the budget, and meets it where single ranks can be added.

    Raises:
      ValueError: no items, a negative score, or a lowest rank below 1 or above the target.

    Example:
      >>> items = [Item(n, s, 64, lambda r: r) for n, s in (("flat", 0.9), ("mid", 0.5), ("steep", 0.1))]
      >>> allocate(items, target=8, lowest=2, highest=16)
      {'flat': 14, 'mid': 8, 'steep': 2}
    """
    levels = sorted(set(candidates or range(lowest, highest + 1)))
    if not items or any(item.score < 0 for item in items) or not 1 <= levels[0] <= target:
        raise ValueError(
            f"allocate: expected weights with scores of at least 0 and a lowest rank between 1 and {target}; got {len(items)} weights, "
            f"lowest rank {levels[0] if levels else None}."
        )
    lowest, highest = levels[0], max(levels[-1], target)
    scores = {i.name: i.score for i in items} if any(i.score > 0 for i in items) else {i.name: 1.0 for i in items}
    budget = sum(item.cost(min(target, item.limit)) for item in items)

    def share(item: Item, factor: float) -> float:
        return min(max(factor * scores[item.name], lowest), highest, item.limit)

    low, high = 0.0, highest / min(score for score in scores.values() if score > 0)
    for _ in range(200):
        middle = (low + high) / 2
        affordable = sum(item.cost(share(item, middle)) for item in items) <= budget
        low, high = (middle, high) if affordable else (low, middle)
    shares = {item.name: share(item, low) for item in items}

    def level_below(item: Item) -> int:
        # The tiny offset keeps a share that bisection left just under a whole rank from rounding down.
        return min(levels[max(bisect_right(levels, shares[item.name] + 1e-6) - 1, 0)], item.limit)

    ranks = {item.name: level_below(item) for item in items}
    total = sum(item.cost(ranks[item.name]) for item in items)
    order = sorted(items, key=lambda item: (ranks[item.name] - shares[item.name], -scores[item.name], item.name))
    moved = True
    while moved:
        moved = False
        for item in order:
            above = bisect_right(levels, ranks[item.name])
            if above == len(levels) or min(levels[above], item.limit) == ranks[item.name]:
                continue
            rank = min(levels[above], item.limit)
            more = item.cost(rank) - item.cost(ranks[item.name])
            overtakes = any(scores[o.name] > scores[item.name] and ranks[o.name] < min(rank, o.limit) for o in items)
            if total + more <= budget + 1e-9 and not overtakes:
                ranks[item.name], total, moved = rank, total + more, True
    return ranks
