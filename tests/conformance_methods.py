"""The table of the conformance suite: a new method is one row, and nothing else to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
      count_shared: parameters trained in leaves common to all sites.
      init_tolerance: how far the output at init may be from the base's, relative; 0: not at all.
      everywhere: run every kind and layout through both bridges; otherwise each runs through one of them in turn.
    """

    name: str
    make: Callable[[], Method]
    count: Callable[[lr.Site, Config], int]
    update: Callable[[Leaves, Leaves, np.ndarray], np.ndarray]
    rank: Callable[[Config], int]
    count_end: Callable[[lr.Site, Config], int] | None = None
    count_shared: int = 0
    init_tolerance: float = 0.0
    everywhere: bool = False


def _lora_count(site: lr.Site, config: Config) -> int:
    return config["rank"] * (site.n_in + site.n_out)


def _lamda_count(site: lr.Site, config: Config) -> int:
    return config["rank"] ** 2 + config["rank"] * site.n_out


def _core_count(site: lr.Site, config: Config) -> int:
    return config["rank"] ** 2


def _rank(config: Config) -> int:
    return config["rank"]


def _lamda_row(name: str, make: Callable[[], Method], scale: float, everywhere: bool = False) -> Row:
    def update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
        anchor = p["m0"] @ p["b0"] if "m0" in p else 0
        return scale * p["a"] @ (p["m"] @ p["b"] - anchor)

    return Row(name, make, _lamda_count, update, _rank, count_end=_core_count, everywhere=everywhere)


_PARTS = (("lora", (("rank", 1),)), ("lora", (("rank", 2), ("alpha", 6.0))))
METHODS = [
    Row("lora", lambda: lr.lora(rank=3, alpha=6), _lora_count, lambda p, g, w: 2 * p["a"] @ p["b"], _rank,
        everywhere=True),
    _lamda_row("lamda", lambda: lr.lamda(rank=3, alpha=6, freeze=0.8), scale=2, everywhere=True),
    _lamda_row("lamda_svd_zero", lambda: lr.lamda(rank=3, alpha=6, freeze=0.8, init="svd_zero"), scale=2),
    _lamda_row("lamda_official", lambda: lr.lamda(rank=3, alpha=6, freeze=0.8, init="official_code"), scale=2),
    _lamda_row("lamda_pp", lambda: lr.lamda_pp(rank=3, freeze=0.8), scale=1),
    Row("pissa", lambda: lr.pissa(rank=3, alpha=6), _lora_count, lambda p, g, w: 2 * (p["a"] @ p["b"] - p["a0"] @ p["b0"]),
        lambda c: 2 * c["rank"], init_tolerance=1e-5),
    Row("lora_xs", lambda: lr.lora_xs(rank=3, alpha=6), _core_count, lambda p, g, w: 2 * p["a"] @ p["m"] @ p["b"], _rank,
        init_tolerance=1e-3),
    Row("full", lr.full, lambda s, c: s.n_in * s.n_out, lambda p, g, w: p["weight"] - w, lambda c: 10**9),
    Row("chain", lambda: lr.build("chain", {"parts": _PARTS}), lambda s, c: 3 * (s.n_in + s.n_out),
        lambda p, g, w: p["0.a"] @ p["0.b"] + 3 * p["1.a"] @ p["1.b"], lambda c: 3),
]  # fmt: skip
