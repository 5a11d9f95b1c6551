"""Arithmetic of task vectors, the changes that trainings made to one weight: trimming, dropping, electing signs.

Functions of host arrays that know no adapters; `lowrank_jax.combine` applies them to updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np


def threshold(changes: Sequence[np.ndarray], density: float) -> float:
    """The magnitude that the largest entries of a task vector reach: ``floor(density * size)`` of them, at least one.

    Args:
      changes: the parts of one task vector, of any shapes, ranked together.

    Example:
      >>> threshold([np.array([1.0, -4.0]), np.array([2.0, 3.0])], 0.5)
      3.0
    """
    magnitudes = np.concatenate([np.abs(x).reshape(-1) for x in changes])
    count = max(1, math.floor(density * magnitudes.size + 1e-9))
    return float(np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count])


def trim(change: np.ndarray, least: float) -> np.ndarray:
    """Zero where the magnitude is below ``least``.

    Example:
      >>> trim(np.array([1.0, -4.0, 2.0]), 2.0).tolist()
      [0.0, -4.0, 2.0]
    """
    return np.where(np.abs(change) >= least, change, 0)


def drop(key: jax.Array, change: np.ndarray, density: float) -> np.ndarray:
    """DARE's drop and rescale: each entry stays with probability ``density``, divided by it, so that the mean stays.

    Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (arXiv 2311.03099).

    Example:
      >>> sorted(set(drop(jax.random.key(0), np.ones(64), 0.25).tolist()))
      [0.0, 4.0]
    """
    return np.where(jax.random.bernoulli(key, density, change.shape), change / np.float32(density), 0)


def disjoint_mean(changes: np.ndarray, sign: Literal["total", "frequency"] = "total") -> np.ndarray:
    """TIES' election of signs and disjoint merge: the mean of the entries that have the elected sign.

    TIES-Merging: Resolving Interference When Merging Models (arXiv 2306.01708). Zeros do not take part; where neither sign wins the
    result is zero, as the paper's sgn(0) has it.

    Args:
      changes: ``[n, ...]``, one for each task, trimmed.
      sign: ``total``: the sign of the sum (the paper's); ``frequency``: the sign that more of the entries have, of a draw that of the sum.

    Example:
      >>> disjoint_mean(np.array([[3.0, -1.0, 2.0], [-1.0, -3.0, 0.0], [-1.0, 1.0, 0.0]])).tolist()
      [3.0, -2.0, 2.0]
    """
    elected = np.sign(changes.sum(0))
    if sign == "frequency":
        majority = np.sign(np.sign(changes).sum(0))
        elected = np.where(majority == 0, elected, majority)
    agree = (np.sign(changes) == elected) & (elected != 0)
    return np.where(agree, changes, 0).sum(0) / np.maximum(agree.sum(0), 1).astype(changes.dtype)


def merge(
    changes: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    least: Sequence[float] | None = None,
    keys: Sequence[jax.Array] | None = None,
    density: float = 1.0,
    elect: Literal["total", "frequency"] | None = None,
) -> np.ndarray:
    """One change of a weight from several.

    Args:
      changes: of equal shape, one for each task. weights: multiply them, after the pruning.
      least: trim each below this magnitude. keys: drop entries of each at random, keeping ``density`` of them.
      elect: average the entries that agree with the elected sign, see `disjoint_mean`; None: sum.

    Example:
      >>> one, two = np.array([3.0, 1.0]), np.array([1.0, -2.0])
      >>> merge([one, two], [1.0, -1.0]).tolist(), merge([one, two], [1.0, 1.0], elect="total").tolist()
      ([2.0, 3.0], [2.0, -2.0])
    """
    if least is not None:
        changes = [trim(change, bound) for change, bound in zip(changes, least, strict=True)]
    if keys is not None:
        changes = [drop(key, change, density) for key, change in zip(keys, changes, strict=True)]
    weighted = np.stack([np.float32(weight) * change for weight, change in zip(weights, changes, strict=True)])
    return weighted.sum(0) if elect is None else disjoint_mean(weighted, elect)
