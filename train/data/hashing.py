"""Reproducible shuffling: the order depends on the seed alone, not on the version of a library."""

from __future__ import annotations

import numpy as np


def mix(values: np.ndarray) -> np.ndarray:
    """Scrambles uint64 values one to one (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(count: int, *seeds: int) -> np.ndarray:
    """Returns the numbers 0 to count - 1 in an order set by the seeds, int64 [count].

    Example:
        >>> permutation(6, 0).tolist() == permutation(6, 0).tolist()
        True
        >>> sorted(permutation(6, 7, 1).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    key = np.zeros(1, np.uint64)
    for seed in seeds:
        key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(mix(mix(np.arange(count, dtype=np.uint64) + np.uint64(1)) ^ key), kind="stable")
