"""Intrinsic dimension: one vector for all weights, and its random projections once more in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from conformance_row import Config, Leaves, Row
from numpy_seeded import numpy_fold, numpy_uniform, numpy_words
from scipy.special import erfinv

import lowrank_jax as lr


def numpy_hadamard(length: int) -> np.ndarray:
    """The Walsh-Hadamard matrix in natural order, entries of one."""
    index = np.arange(length)
    common = index[:, None] & index
    return 1.0 - 2 * (np.array([bin(word).count("1") for word in common.ravel()]).reshape(common.shape) % 2)


def numpy_permutation(seed: np.ndarray, length: int) -> np.ndarray:
    bits = length.bit_length() - 1
    index = np.arange(length)
    for odd, shift in numpy_words(seed, (8, 2)).astype(object):
        index = np.array([(int(i) * (int(odd) | 1) + int(shift)) % length for i in index])
        index ^= index >> max(1, (bits + 1) // 2)
    return index


def numpy_projection(projection: str, seed: np.ndarray, size: int, dimension: int) -> np.ndarray:
    """P ``[size, dimension]`` in float64, columns of length 1 (Fastfood: nearly)."""
    seed = np.asarray(seed).astype(np.uint32)
    if projection == "dense":
        p = np.sqrt(2) * erfinv(numpy_uniform(numpy_fold(seed, 0), (dimension, size))).T
        return p / np.linalg.norm(p, axis=0)
    if projection == "sparse":
        count = max(1, round(size**0.5))
        edges = [n * size // count for n in range(count + 1)]
        place, sign = (numpy_words(numpy_fold(seed, n), (dimension, count)) for n in (0, 1))
        p = np.zeros((size, dimension))
        for column in range(dimension):
            for n, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
                p[start + int(place[column, n]) % (stop - start), column] = 1 - 2 * float(sign[column, n] >> 31)
        return p / np.sqrt(count)
    length = 1
    while length < max(size, dimension):
        length *= 2
    h = numpy_hadamard(length)
    b = 1 - 2.0 * (numpy_words(numpy_fold(seed, 0), (length,)) >> 31)
    g = np.sqrt(2) * erfinv(numpy_uniform(numpy_fold(seed, 2), (length,)))
    pi = np.eye(length)[numpy_permutation(numpy_fold(seed, 1), length)]
    p = h @ np.diag(g) @ pi @ h @ np.diag(b)
    return p[:size, :dimension] / np.sqrt(size * (g**2).sum())


def _row(name: str, **fields: Any) -> Row:
    def update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
        size = kernel.shape[-2] * kernel.shape[-1]
        share = (size / shared["size"]) ** 0.5 if "size" in shared else 1.0
        theta = shared["theta"]
        offsets = [
            scale * share * numpy_projection(fields.get("projection", "fastfood"), seed, size, len(theta)) @ theta
            for scale, seed in zip(p["scale"].reshape(-1), p["seed"].reshape(-1, 2), strict=True)
        ]
        return np.stack(offsets).reshape(kernel.shape)

    def own(site: lr.Site, config: Config) -> int:
        return int(config["per_site_scale"])

    def common(sites: list[lr.Site]) -> int:
        layers = sum(int(np.prod(site.batch_shape)) for site in sites)
        return 20 - layers * bool(fields.get("per_site_scale"))

    return Row(name, lambda: lr.intrinsic(20, **fields), own, update, lambda c: 10**9, count_shared=common)


ROWS = [
    _row("intrinsic"),
    _row("intrinsic_said", projection="sparse", per_site_scale=True, normalise="site"),
]
