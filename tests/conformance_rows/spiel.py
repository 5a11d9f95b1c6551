"""SpIEL, whose entries move: its momentum approximation, and the form that a caller reselects."""

from __future__ import annotations

import math

import numpy as np
from conformance_row import Config, Leaves, Row

import lowrank_jax as lr


def spiel_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    """``v`` added at ``(row, column)``, rounded towards zero; equal positions, which noise on them makes, add up."""
    flat = np.zeros((*kernel.shape[:-2], kernel.shape[-2] * kernel.shape[-1]))
    row, column = (
        np.clip(p[name].astype(int), 0, n - 1) for name, n in zip(("row", "column"), kernel.shape[-2:], strict=True)
    )
    layers = flat.reshape(-1, flat.shape[-1])
    for layer, at, v in zip(layers, *(x.reshape(len(layers), -1) for x in (row * kernel.shape[-1] + column, p["v"])),
                            strict=True):  # fmt: skip
        np.add.at(layer, at, v)
    return flat.reshape(kernel.shape)


def density_count(site: lr.Site, config: Config) -> int:
    return math.floor(config["density"] * site.n_in * site.n_out)


def entries_count(site: lr.Site, config: Config) -> int:
    return config["entries"]


def any_rank(config: Config) -> int:
    return 10**9


ROWS = [
    # Two swaps in the four steps that the suite makes.
    Row("spiel", lambda: lr.spiel(density=0.3, first=1, every=2), density_count, spiel_update, any_rank),
    Row("spiel_total", lambda: lr.spiel(total=100, growth="gradient"), entries_count, spiel_update, any_rank),
]
