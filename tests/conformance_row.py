"""What the conformance suite has to know of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import lowrank_jax as lr
from lowrank_jax.methods.base import Method

Config = Mapping[str, Any]
Leaves = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What the suite has to know of a method.

    Attributes:
      name: of the row. make: the method; take alpha != rank, so that a scale applied twice or never shows.
      count: ``(site, config) ->`` parameters trained at the start at one layer of a site; ``config`` is the site's own method's.
      update: ``(leaves, shared, kernel) ->`` the update ``[*batch, n_in, n_out]`` in float64 numpy, as the paper writes it; None: the
        form has none, and says so.
      rank: ``config ->`` bound on the rank of the update; None where there is no update.
      count_end: like ``count`` for the end of a run; None: the same.
      count_shared: parameters trained in leaves common to all sites, ``[site] ->`` number or a number.
      bias_update: ``(leaves, shared, kernel, bias) ->`` the update of the bias ``[*batch, n_out]``; None: the bias stays. ``bias`` is None
        where the module has none.
      adds_bias: the method adds to the bias even where the module has none, which cannot be merged: that is asserted, instead of what
        merging gives, for a model with such a module.
      signals: ``{name: [4]}``, what the method wants to know of each row of the batch.
      init_tolerance: how far the output at init may be from the base's, relative; 0: not at all.
      rank_limit: ``site ->`` the largest rank it takes; None: the weight's smaller dimension.
      any_rank: whether a rank above the weight's dimensions makes sense (frozen random directions), so that none is refused.
      everywhere: run every kind and layout through both bridges; otherwise each runs through one of them in turn.
    """

    name: str
    make: Callable[[], Method]
    count: Callable[[lr.Site, Config], int]
    update: Callable[[Leaves, Leaves, np.ndarray], np.ndarray] | None
    rank: Callable[[Config], int] | None
    count_end: Callable[[lr.Site, Config], int] | None = None
    count_shared: int | Callable[[list[lr.Site]], int] = 0
    bias_update: Callable[[Leaves, Leaves, np.ndarray, np.ndarray | None], np.ndarray | None] | None = None
    adds_bias: bool = False
    signals: Mapping[str, Sequence[float]] | None = field(default=None, hash=False)
    init_tolerance: float = 0.0
    rank_limit: Callable[[lr.Site], int] | None = None
    any_rank: bool = False
    everywhere: bool = False


def lora_count(site: lr.Site, config: Config) -> int:
    return config["rank"] * (site.n_in + site.n_out)


def rank_of(config: Config) -> int:
    return config["rank"]
