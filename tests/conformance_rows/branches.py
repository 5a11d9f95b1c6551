"""LoRA and what scales it: DoRA, IA3, groups and pairs of LoRAs (PEGO, PETALface, ViDA), ALLoRA."""

from __future__ import annotations

import numpy as np
from conformance_row import Config, Leaves, Row, lora_count, rank_of

import lowrank_jax as lr


def full_rank(config: Config) -> int:
    return 10**9


def _dora_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    weight = kernel + 2 * p["a"] @ p["b"]
    return p["magnitude"][..., None, :] * weight / np.linalg.norm(weight, axis=-2, keepdims=True) - kernel


def _dora_count(site: lr.Site, config: Config) -> int:
    return lora_count(site, config) + site.n_out


def _ia3_input(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    """A convolution's channels are the fastest of its inputs."""
    factor = np.concatenate([p["l"]] * (kernel.shape[-2] // p["l"].shape[-1]), -1)
    return factor[..., None] * kernel - kernel


def _ia3_bias(p: Leaves, shared: Leaves, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray | None:
    return None if bias is None else bias * p["l"] - bias


def _group_count(site: lr.Site, config: Config) -> int:
    return config["group"] * lora_count(site, config)


def _vida_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    low, high = (p["vida_scales"][..., n, None, None] for n in (0, 1))
    return low * p["low_a"] @ p["low_b"] + high * p["high_a"] @ p["high_b"]


def _pair_count(site: lr.Site, config: Config) -> int:
    return 2 * lora_count(site, config)


def _pair_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    """At quality 0.6 with threshold 0.4 the second of the two has the weight 0.7."""
    first, second = (p["a"][..., n : n + 2] @ p["b"][..., n : n + 2, :] for n in (0, 2))
    return 2 * (0.3 * first + 0.7 * second)


ROWS = [
    Row("dora", lambda: lr.dora(rank=3, alpha=6), _dora_count, _dora_update, full_rank, init_tolerance=1e-6),
    Row("dora_differentiated", lambda: lr.dora(rank=3, alpha=6, norm="differentiated"), _dora_count, _dora_update, full_rank,
        init_tolerance=1e-6),
    Row("ia3", lr.ia3, lambda s, c: s.n_out, lambda p, g, w: w * p["l"][..., None, :] - w, full_rank, bias_update=_ia3_bias),
    Row("ia3_input", lambda: lr.ia3(side="input"), lambda s, c: s.shape[s.inputs[-1]] if s.kind == "conv" else s.n_in,
        _ia3_input, full_rank, init_tolerance=1e-6),
    Row("pego", lambda: lr.pego(rank=2, group=2, alpha=4, preserve=0.1, diversify=0.2), _group_count,
        lambda p, g, w: 2 * p["a"] @ p["b"], lambda c: c["group"] * c["rank"]),
    Row("vida", lambda: lr.vida(rank=2, high_rank=3), lambda s, c: (c["rank"] + c["high_rank"]) * (s.n_in + s.n_out), _vida_update,
        lambda c: c["rank"] + c["high_rank"]),
    Row("petalface", lambda: lr.petalface(rank=2, alpha=4, threshold=0.4), _pair_count, None, None,
        signals={"quality": [0.2, 0.9, 0.5, 0.4]}),
    Row("petalface_fixed", lambda: lr.petalface(rank=2, alpha=4, threshold=0.4, quality=0.6), _pair_count, _pair_update,
        lambda c: 2 * c["rank"]),
    Row("allora", lambda: lr.allora(rank=3, eta=2.0), lora_count, lambda p, g, w: p["a"] @ p["b"], rank_of),
]  # fmt: skip
