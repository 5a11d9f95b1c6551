"""Arithmetic of low-rank updates as factors: joined, trimmed, cut to a rank, stacked; never a dense matrix where factors do.

One matrix at a time, ``a [n_in, r] @ b [r, n_out]``, as float32 arrays of the host: a decomposition once per training run is worth no
compilation, and the host's is exact to float32 where an accelerator's need not be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import linalg
from lowrank_jax.forms import Chain, Form, LowRank

Rank = int | float | None


class Factors(NamedTuple):
    """The update ``scale * a @ b`` of one matrix: ``a [n_in, r]``, ``b [r, n_out]``."""

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[-2], self.b.shape[-1]

    def dense(self) -> np.ndarray:
        """The update itself."""
        return self.a @ _times(self.b, self.scale)


def check_target(rank: Rank) -> None:
    """Raises a ValueError unless ``rank`` is None, a number of directions, or a share of the energy in (0, 1]."""
    if rank is None:
        return
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"rank={rank}: as a share of the energy it has to be above 0 and at most 1.")
    elif rank < 1:
        raise ValueError(f"rank={rank}: expected at least 1 direction, a share of the energy in (0, 1], or None.")


def is_low_rank(form: Form) -> bool:
    """Whether a form is exactly low-rank, and so does not depend on the weight."""
    return all(map(is_low_rank, form.forms)) if isinstance(form, Chain) else form.record.low_rank


def factors_of(form: Form) -> Factors | None:
    """The factors of a low-rank form with a core multiplied in; batch axes may lie in front.

    None where they have more directions than the matrix: then the matrix is smaller.
    """
    wide = jax.eval_shape(lambda: absorbed(form))
    if wide.a.shape[-1] > min(wide.a.shape[-2], wide.b.shape[-1]):
        return None
    low = absorbed(form)
    return Factors(np.asarray(low.a), np.asarray(low.b), low.scale)


def absorbed(form: Form) -> LowRank:
    """The two factors of a low-rank form, float32, a core multiplied in, at full precision on accelerators too."""
    with jax.default_matmul_precision("highest"):
        return _absorbed(form)


def _absorbed(form: Form) -> LowRank:
    if isinstance(form, Chain):
        parts = [_absorbed(part) for part in form.forms]
        b = jnp.concatenate([part.b * part.scale for part in parts], -2)
        return LowRank(jnp.concatenate([part.a for part in parts], -1), b)
    low: LowRank = form.as_low_rank()  # type: ignore[attr-defined]
    a, b = low.a.astype(jnp.float32), low.b.astype(jnp.float32)
    if low.mid is not None:
        mid = low.mid.astype(jnp.float32)
        if mid.ndim < a.ndim:
            b = mid[..., None] * b
        elif b.shape[-1] <= a.shape[-2]:  # into the smaller factor
            b = mid @ b
        else:
            a = a @ mid
    return LowRank(a, b, scale=low.scale, dropout=low.dropout)


def joined(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum, exactly: factors side by side, scales and weights in ``b``.

    Example:
      >>> one, two = Factors(np.ones((2, 1)), np.ones((1, 2))), Factors(np.ones((2, 2)), np.ones((2, 2)), 0.5)
      >>> both = joined([one, two], [1.0, -3.0])
      >>> both.a.shape, both.dense()[0].tolist()
      ((2, 3), [-2.0, -2.0])
    """
    b = [_times(part.b, part.scale * weight) for part, weight in zip(parts, weights, strict=True)]
    return Factors(np.concatenate([part.a for part in parts], -1), np.concatenate(b, -2))


def trimmed(factors: Factors) -> Factors:
    """Without the directions that are zero in both factors (padding); at least one stays. The scale goes into ``b``."""
    used = (factors.a != 0).any(0) | (factors.b != 0).any(1)
    used[0] |= not used.any()
    return Factors(factors.a[:, used], _times(factors.b[used], factors.scale))


def reduced(
    update: Factors | np.ndarray, rank: Rank = None, svd: Literal["exact", "randomized"] = "exact"
) -> tuple[Factors, bool]:
    """An update cut to its leading singular directions, and whether something was computed anew (False: the factors as they were).

    Args:
      update: factors, or a dense ``[n_in, n_out]``.
      rank: at most so many directions; a float: as few as hold this share of the squared Frobenius norm; None: all there are.
      svd: of a dense update; ``randomized`` needs a number of directions.

    Example:
      >>> dense = np.diag(np.float32([4, 3, 0]))
      >>> reduced(dense, 0.6)[0].rank, reduced(dense)[0].rank
      (1, 2)
    """
    limit = min(update.shape)
    count = limit if rank is None or isinstance(rank, float) else min(rank, limit)
    if isinstance(update, Factors):
        update = trimmed(update)
        if not isinstance(rank, float) and update.rank <= count:
            return update, False
        qa, ra = np.linalg.qr(update.a.astype(np.float64))
        qb, rb = np.linalg.qr(update.b.T.astype(np.float64))
        u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
        u, vt = qa @ u, vt @ qb.T
    elif svd == "exact":
        u, s, vt = np.linalg.svd(update, full_matrices=False)
    elif rank is None or isinstance(rank, float):
        raise ValueError(f"svd='randomized' needs a number of directions, not rank={rank}: a share is of all of them.")
    else:
        u, s, vt = map(np.asarray, linalg.svd(jnp.asarray(update), count, key=jax.random.key(0), method=svd))
    k = _directions(s.astype(np.float64), rank, max(update.shape))
    root = np.sqrt(s[:k])
    return Factors((u[:, :k] * root).astype(np.float32), (root[:, None] * vt[:k]).astype(np.float32)), True


def _directions(s: np.ndarray, rank: Rank, size: int) -> int:
    """How many of the singular values ``s`` to keep; what rounding alone makes is never kept."""
    k = int((s > np.finfo(np.float32).eps * size * s[0]).sum())
    if isinstance(rank, float):
        energy = np.cumsum(s**2)
        k = min(k, int(np.searchsorted(energy, rank * energy[-1])) + 1)
    elif rank is not None:
        k = min(k, rank)
    return max(1, k)


def squared_distance(update: Factors | np.ndarray, factors: Factors) -> float:
    """``|update - factors|^2`` in the Frobenius norm; the factors may be in another dtype."""
    factors = Factors(factors.a.astype(np.float32), factors.b.astype(np.float32), factors.scale)
    if isinstance(update, Factors):
        return squared_norm(joined([update, factors], [1.0, -1.0]))
    return squared_norm(update - factors.dense())


def squared_norm(update: Factors | np.ndarray) -> float:
    """``|update|^2`` in the Frobenius norm."""
    if isinstance(update, np.ndarray):
        return float(np.vdot(update, update))
    # By QR, not by Gram matrices, which would lose half the digits of a small difference.
    core = np.linalg.qr(update.a.astype(np.float64))[1] @ np.linalg.qr(update.b.T.astype(np.float64))[1].T
    return float(np.vdot(core, core)) * update.scale**2


def stacked(parts: Sequence[Factors], batch_shape: tuple[int, ...], rank: int | None = None) -> dict[str, np.ndarray]:
    """``{"a": [*batch, n_in, r], "b": [*batch, r, n_out]}`` of every matrix of a stack, padded with zeros to ``rank`` (None: the largest).

    Example:
      >>> one, two = Factors(np.ones((4, 1)), np.ones((1, 3))), Factors(np.ones((4, 2)), np.ones((2, 3)))
      >>> stacked([one, two], (2,))["a"].shape
      (2, 4, 2)
    """
    r = max(part.rank for part in parts) if rank is None else rank
    assert len(parts) == math.prod(batch_shape)
    a = np.stack([np.pad(part.a, ((0, 0), (0, r - part.rank))) for part in parts])
    b = np.stack([np.pad(_times(part.b, part.scale), ((0, r - part.rank), (0, 0))) for part in parts])
    return {"a": a.reshape(*batch_shape, *a.shape[1:]), "b": b.reshape(*batch_shape, *b.shape[1:])}


def _times(x: np.ndarray, factor: float) -> np.ndarray:
    return x if factor == 1 else x * np.asarray(factor, x.dtype)
