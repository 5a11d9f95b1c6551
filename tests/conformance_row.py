"""What the conformance suite has to know of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
      update: ``(leaves, shared, kernel) ->`` the update ``[*batch, n_in, n_out]`` in float64 numpy, as the paper writes it.
      rank: ``config ->`` bound on the rank of the update.
      count_end: like ``count`` for the end of a run; None: the same.
      count_shared: parameters trained in leaves common to all sites, ``[site] ->`` number or a number.
      bias_update: ``(leaves, shared, kernel, bias) ->`` the update of the bias ``[*batch, n_out]``; None: the bias stays. ``bias`` is None
        where the module has none.
      signals: ``{name: [4]}``, what the method wants to know of each row of the batch.
      init_tolerance: how far the output at init may be from the base's, relative; 0: not at all.
      everywhere: run every kind and layout through both bridges; otherwise each runs through one of them in turn.
    """

    name: str
    make: Callable[[], Method]
    count: Callable[[lr.Site, Config], int]
    update: Callable[[Leaves, Leaves, np.ndarray], np.ndarray]
    rank: Callable[[Config], int]
    count_end: Callable[[lr.Site, Config], int] | None = None
    count_shared: int | Callable[[list[lr.Site]], int] = 0
    bias_update: Callable[[Leaves, Leaves, np.ndarray, np.ndarray | None], np.ndarray | None] | None = None
    signals: Mapping[str, Sequence[float]] | None = None
    init_tolerance: float = 0.0
    everywhere: bool = False


def lora_count(site: lr.Site, config: Config) -> int:
    return config["rank"] * (site.n_in + site.n_out)


def rank_of(config: Config) -> int:
    return config["rank"]
