"""Methods that save on bits or on entries: 1-bit adapters, SaRA, SLTrain."""

from __future__ import annotations

import math

import numpy as np
from conformance_row import Config, Leaves, Row, lora_count, rank_of
from numpy_seeded import numpy_words
from scipy.stats import norm

import lowrank_jax as lr


def quantised(w: np.ndarray, bits: int) -> np.ndarray:
    """Each matrix in ``2^bits`` values: codes that are the medians of their cells, boundaries halfway between codes."""
    codes = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(500):
        below = norm.cdf([-np.inf, *(codes[1:] + codes[:-1]) / 2, np.inf])
        codes = norm.ppf((below[1:] + below[:-1]) / 2)
    mean, deviation = w.mean((-2, -1), keepdims=True), w.std((-2, -1), ddof=1, keepdims=True)
    nearest = np.abs((w - mean) / (deviation + 1e-5) - codes[:, *[None] * w.ndim]).argmin(0)
    return codes[nearest] * deviation + mean


def _one_bit_update(bits: int):
    def update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
        return 2 * quantised(p["a"], bits) @ quantised(p["b"], bits)

    return update


def scattered(values: np.ndarray, indices: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """``values [*batch, nnz]`` at flat positions of matrices like ``kernel``."""
    flat = np.zeros((*kernel.shape[:-2], kernel.shape[-2] * kernel.shape[-1]))
    np.put_along_axis(flat, indices.astype(int), values, -1)
    return flat.reshape(kernel.shape)


def _sara_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    below = np.abs(p["p"]) <= np.abs(p["p0"]).max(-1, keepdims=True)
    return scattered(p["p"] + np.where(below, p["p2"], 0) - p["p0"], p["indices"], kernel)


def _fraction_count(site: lr.Site, config: Config) -> int:
    return math.floor(config["fraction"] * site.n_in * site.n_out)


def _sltrain_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    indices = p["indices"] if "indices" in p else _stretches(p["seed"], p["v"].shape, kernel)
    return 2 * p["a"] @ p["b"] + scattered(p["v"], indices, kernel)


def _stretches(seeds: np.ndarray, shape: tuple[int, ...], kernel: np.ndarray) -> np.ndarray:
    """``numpy.array_split`` cuts in the same way."""
    stretches = np.array_split(np.arange(kernel.shape[-2] * kernel.shape[-1]), shape[-1])
    each = [
        [s[word % len(s)] for s, word in zip(stretches, numpy_words(seed, shape[-1:]), strict=True)]
        for seed in seeds.reshape(-1, 2)
    ]
    return np.reshape(each, shape)


def _sltrain_count(site: lr.Site, config: Config) -> int:
    return lora_count(site, config) + math.floor(config["density"] * site.n_in * site.n_out)


def any_rank(config: Config) -> int:
    return 10**9


ROWS = [
    Row("one_bit", lambda: lr.one_bit(rank=3, alpha=6), lora_count, _one_bit_update(1), rank_of, init_tolerance=1e-2),
    Row("one_bit_two_bits", lambda: lr.one_bit(rank=3, alpha=6, bits=2), lora_count, _one_bit_update(2), rank_of,
        init_tolerance=1e-2),
    Row("one_bit_relu", lambda: lr.one_bit(rank=3, alpha=6, activation="relu"), lora_count, None, None,
        init_tolerance=1e-2),
    Row("sara", lambda: lr.sara(fraction=0.3, nuclear=0.1, nuclear_above=4), _fraction_count, _sara_update, any_rank),
    # For pre-training there is no base to start from: with one, the random entries are added to it.
    Row("sltrain", lambda: lr.sltrain(rank=3, alpha=6, density=0.3), _sltrain_count, _sltrain_update, any_rank,
        init_tolerance=2.0),
    Row("sltrain_finetune", lambda: lr.sltrain(rank=3, alpha=6, density=0.3, init="finetune", support="stratified"),
        _sltrain_count, _sltrain_update, any_rank),
]  # fmt: skip
