"""Methods whose start or ranks come from a decomposition of the weight or from statistics of data."""

from __future__ import annotations

import numpy as np
from conformance_row import Leaves, Row, lora_count, rank_of

import lowrank_jax as lr


def _anchored(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    return 2 * (p["a"] @ p["b"] - p["a0"] @ p["b0"])


def _diagonal(scale: float) -> object:
    def update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
        return scale * np.einsum("...ir,...r,...ro->...io", p["a"], p["e"] - p["e0"], p["b"])

    return update


ROWS = [
    Row("lora_ga", lambda: lr.lora_ga(rank=3, alpha=6, rank_stabilised=False), lora_count, _anchored, lambda c: 2 * c["rank"],
        init_tolerance=1e-5, rank_limit=lambda site: site.max_rank // 2),
    Row("corda", lambda: lr.corda(rank=3, alpha=6), lora_count, _anchored, lambda c: 2 * c["rank"], init_tolerance=1e-5),
    Row("corda_kept", lambda: lr.corda(rank=3, alpha=6, mode="knowledge_preserved"), lora_count, _anchored, lambda c: 2 * c["rank"],
        init_tolerance=1e-5),
    Row("lora_sb", lambda: lr.lora_sb(rank=3, rate=1e-4), lambda s, c: c["rank"] ** 2, lambda p, g, w: p["a"] @ p["m"] @ p["b"], rank_of,
        init_tolerance=3e-2),
    Row("svfit", lambda: lr.svfit(rank=3), lambda s, c: c["rank"], _diagonal(1), rank_of),
    Row("loldu", lambda: lr.loldu(rank=3, alpha=6), lambda s, c: c["rank"], _diagonal(2), rank_of),
    Row("colora", lambda: lr.colora(rank=3, alpha=6), lora_count, lambda p, g, w: 2 * p["a"] @ p["b"], rank_of),
]  # fmt: skip
