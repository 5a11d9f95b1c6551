"""LaMDA: a frozen projection, a small trainable square matrix, and a second projection that is gradually frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf, mid_leaf
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    method,
    random_a,
    scaling,
)
from lowrank_jax.methods.ranks import Rank, largest, layer_ranks
from lowrank_jax.methods.ranks import used as in_use
from lowrank_jax.optim.freeze_rows import freeze_rows
from lowrank_jax.sites import Site


@method
def lamda(
    rank: Rank = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    freeze: float = 0.3,
    init: Literal["svd_residual", "svd_zero", "official_code"] = "svd_residual",
    core: Literal["identity", "balanced", "sigma"] = "identity",
    order: Literal["descending", "ascending"] = "descending",
    svd: Literal["randomized", "exact"] = "randomized",
) -> Method:
    """LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation (arXiv 2406.12832).

    ``y = x K + s * x a m b`` with ``a [n_in, r]`` frozen, ``m [r, r]`` trained and ``b [r, n_out]`` trained at first: over the first
    ``freeze`` of the run its rows freeze one after another, after which it leaves the differentiated tree and the optimizer and
    only ``m`` trains. Because ``a`` is frozen the backward pass keeps ``x a``, not ``x``.
    Count: ``r*r + (r - frozen) * n_out``, and ``r*r`` from ``freeze`` on.

    With ``K = U diag(sig) V^T``, ``svd_residual`` starts at ``s * a m b = U_r diag(sig_r) V_r^T`` and the base acts as the residual: the
    initial core and ``b`` are a frozen anchor, so the output starts exactly at the base's. That the paper starts from singular vectors is
    known; where the singular values sit is a reconstruction: the product, and so the start, is the same for each ``core``, the
    geometry that Adam sees is not. bench/tweets.py compares them with equal grids of learning rates: ``identity`` is the best on average,
    ``balanced`` within its noise, ``sigma`` behind both.

    Args:
      rank: r, or one for each element of a stacked weight (layers of a scan, flattened); the stack is padded to the largest.
      alpha: ``s = alpha / r``; None takes alpha = rank. dropout: on the input of this path, during training.
      freeze: fraction of the run after which ``b`` is wholly frozen; 0 never trains it, 1 freezes it at the end.
      init: ``svd_residual``; ``svd_zero``: ``m = 0`` and the base untouched; ``official_code``: what the released code does, no SVD,
        ``a`` and ``m`` random, ``b = 0``.
      core: where ``svd_residual`` keeps the singular values: ``identity``: all in ``b`` and ``m = I / s``; ``balanced``: their
        roots in ``a`` and ``b``; ``sigma``: ``m = diag(sig) / s``.
      order: which rows of ``b`` freeze first, by singular value. svd: ``randomized`` (range finder) or ``exact``.

    Raises:
      ValueError: an unknown choice, ``freeze`` outside [0, 1], or (at a site) a rank above its smaller dimension or a tuple of ranks of
        the wrong length.

    Example:
      >>> method = lamda(rank=4)
      >>> method.exact_init
      True
    """
    check_choice("lamda", "init", init, ("svd_residual", "svd_zero", "official_code"))
    check_choice("lamda", "core", core, ("identity", "balanced", "sigma"))
    check_choice("lamda", "order", order, ("descending", "ascending"))
    check_choice("lamda", "svd", svd, ("randomized", "exact"))
    check_dropout("lamda", dropout)
    if not 0 <= freeze <= 1:
        raise ValueError(f"lamda(freeze={freeze}): expected a fraction of the run in [0, 1].")
    r = largest(rank)
    scale = scaling(r, alpha)
    anchored = init == "svd_residual"

    def leaves(site: Site) -> dict[str, Leaf]:
        total = layer_ranks("lamda", rank, site)
        b_trains = (0.0, float(freeze)) if freeze > 0 else None
        kept = {
            "a": a_leaf(site, r, trains=None),
            "m": mid_leaf(site, r, count=int((total**2).sum())),
            "b": b_leaf(site, r, trains=b_trains, count=int(total.sum()) * site.n_out),
        }
        if anchored:
            kept["m0"] = mid_leaf(site, r, trains=None, anchor=True)
            kept["b0"] = b_leaf(site, r, trains=None, anchor=True)
        return kept

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        # Directions beyond a layer's own rank are zero in a, m and b, and so are all their gradients.
        used = in_use(site, rank)
        if init == "official_code":
            a_key, m_key = jax.random.split(key)
            bound = 1 / np.sqrt(r)
            m = jax.random.uniform(m_key, (*site.batch_shape, r, r), minval=-bound, maxval=bound)
            a = random_a(a_key, (*site.batch_shape, site.n_in, r))
            b = jnp.zeros((*site.batch_shape, r, site.n_out))
            return {"a": a * used[..., None, :], "m": m * used[..., None] * used[..., None, :], "b": b}
        kernel = given.need("kernel")
        u, sigma, vt = linalg.svd(kernel, r, key=key, method=svd)
        u, vt = u * used[..., None, :], vt * used[..., None]
        if init == "svd_zero":
            return {"a": u, "m": jnp.zeros((*sigma.shape, r)), "b": vt}
        one = jnp.ones_like(sigma)
        in_a, in_m, in_b = {
            "identity": (one, one, sigma),
            "balanced": (jnp.sqrt(sigma), one, jnp.sqrt(sigma)),
            "sigma": (one, sigma, one),
        }[core]
        m = (in_m * used / scale)[..., None] * jnp.eye(r)
        b = vt * in_b[..., None]
        return {"a": u * in_a[..., None, :], "m": m, "b": b, "m0": m, "b0": b}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        if "m0" in leaves:
            # a is common to both, so update minus anchor is one LowRank of rank r, and exactly zero at init.
            difference = leaves["m"] @ leaves["b"] - leaves["m0"] @ leaves["b0"]
            return LowRank(leaves["a"], difference, scale=scale, dropout=dropout)
        return LowRank(leaves["a"], leaves["b"], leaves["m"], scale=scale, dropout=dropout)

    def anchor(site: Site, leaves: Mapping[str, jax.Array]) -> LowRank:
        return LowRank(leaves["a"], leaves["b0"], leaves["m0"], scale=scale)

    def transform(total_steps: int) -> optax.GradientTransformation:
        return freeze_rows("b", freeze * total_steps, rank, order)

    return Method(
        LowRank,
        leaves,
        init_leaves,
        expand,
        anchor=anchor if anchored else None,
        transform=transform if freeze > 0 else None,
        needs=frozenset() if init == "official_code" else frozenset({"kernel"}),
    )
