"""Methods whose rank changes during or after training: AdaLoRA, SoRA, DyLoRA, IncreLoRA."""

from __future__ import annotations

import numpy as np
from conformance_row import Config, Leaves, Row, lora_count, rank_of

import lowrank_jax as lr


def triplet_count(site: lr.Site, config: Config) -> int:
    return config["rank"] * (site.n_in + site.n_out + 1)


def triplet_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    return 2 * (p["a"] * p["e"][..., None, :]) @ p["b"]


def growing_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    return 6 * (p["a"] * (p["e"] / p["active"])[..., None, :]) @ p["b"]


ROWS = [
    Row("adalora", lambda: lr.adalora(rank=3, target=2, alpha=6), triplet_count, triplet_update, rank_of),
    Row("sora", lambda: lr.sora(rank=3, alpha=6, threshold=1e-3, l1=0.1), triplet_count, triplet_update, rank_of),
    Row("dylora", lambda: lr.dylora(rank=3, alpha=6), lora_count, lambda p, g, w: 2 * p["a"] @ p["b"], rank_of),
    Row("increlora", lambda: lr.increlora(rank=3, target=2, alpha=6), triplet_count, growing_update, rank_of,
        init_tolerance=1e-6),
]  # fmt: skip
