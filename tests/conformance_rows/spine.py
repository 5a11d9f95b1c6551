"""The methods of the spine: LoRA, LaMDA and its inits, LaMDA++, PiSSA, LoRA-XS, a fixed subspace, full fine-tuning, chains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from conformance_row import Config, Leaves, Row, lora_count, rank_of

import lowrank_jax as lr
from lowrank_jax.methods.base import Method


def _lamda_count(site: lr.Site, config: Config) -> int:
    return config["rank"] ** 2 + config["rank"] * site.n_out


def core_count(site: lr.Site, config: Config) -> int:
    return config["rank"] ** 2


def _lamda_row(name: str, make: Callable[[], Method], scale: float, everywhere: bool = False) -> Row:
    def update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
        anchor = p["m0"] @ p["b0"] if "m0" in p else 0
        return scale * p["a"] @ (p["m"] @ p["b"] - anchor)

    return Row(name, make, _lamda_count, update, rank_of, count_end=core_count, everywhere=everywhere)


_PARTS = (("lora", (("rank", 1),)), ("lora", (("rank", 2), ("alpha", 6.0))))
ROWS = [
    Row("lora", lambda: lr.lora(rank=3, alpha=6), lora_count, lambda p, g, w: 2 * p["a"] @ p["b"], rank_of,
        everywhere=True),
    _lamda_row("lamda", lambda: lr.lamda(rank=3, alpha=6, freeze=0.8), scale=2, everywhere=True),
    _lamda_row("lamda_svd_zero", lambda: lr.lamda(rank=3, alpha=6, freeze=0.8, init="svd_zero"), scale=2),
    _lamda_row("lamda_official", lambda: lr.lamda(rank=3, alpha=6, freeze=0.8, init="official_code"), scale=2),
    _lamda_row("lamda_pp", lambda: lr.lamda_pp(rank=3, freeze=0.8), scale=1),
    Row("pissa", lambda: lr.pissa(rank=3, alpha=6), lora_count, lambda p, g, w: 2 * (p["a"] @ p["b"] - p["a0"] @ p["b0"]),
        lambda c: 2 * c["rank"], init_tolerance=1e-5),
    Row("lora_xs", lambda: lr.lora_xs(rank=3, alpha=6), core_count, lambda p, g, w: 2 * p["a"] @ p["m"] @ p["b"], rank_of,
        init_tolerance=1e-3),
    Row("subspace_update", lambda: lr.subspace_update(rank=3), lambda s, c: c["rank"] * max(s.n_in, s.n_out),
        lambda p, g, w: p["p"] @ p["r"] if "p" in p else p["r"] @ p["q"], rank_of),
    Row("full", lr.full, lambda s, c: s.n_in * s.n_out, lambda p, g, w: p["weight"] - w, lambda c: 10**9),
    Row("chain", lambda: lr.build("chain", {"parts": _PARTS}), lambda s, c: 3 * (s.n_in + s.n_out),
        lambda p, g, w: p["0.a"] @ p["0.b"] + 3 * p["1.a"] @ p["1.b"], lambda c: 3),
]  # fmt: skip
