"""SLTrain: a weight as the sum of a low-rank and a sparse matrix, for pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import seeded
from lowrank_jax.batching import over_batch
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, Sparse, SparseLowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_rank, method, random_a, scaling
from lowrank_jax.methods.entries import check_share, count_entries
from lowrank_jax.sites import Site


@method
def sltrain(
    rank: int = 128,
    alpha: float | None = None,
    density: float = 0.03,
    init: Literal["pretrain", "finetune"] = "pretrain",
    support: Literal["uniform", "stratified"] = "uniform",
) -> Method:
    """SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining (arXiv 2406.02214).

    ``y = x (K0 + s a b + scatter(v))`` with ``a [n_in, r]``, ``b [r, n_out]`` and ``v [nnz]`` trained, the latter at
    ``nnz = floor(density * n_in * n_out)`` fixed random positions. Pre-training starts on a base of zeros, ``K0 = 0``: a low-rank weight
    alone cannot learn what a full one does, with a few free entries it nearly can. Beside a pre-trained weight it is an update of full
    rank. The dense sum is made one layer at a time, forward and backward, and none is kept; the gradient of ``v`` is gathered from
    ``x^T g``.
    Count: ``r * (n_in + n_out) + nnz``.

    The paper pre-trains with AdamW at 3e-3 without decay, on all linear weights of attention and MLP, 3% of the entries, and for 60
    million parameters r = 128 and alpha = 32. Its learnable scale is not here. `lowrank_jax.merge` into the base of zeros gives the dense
    weights. Zeros made by ``jnp.zeros`` inside the jitted step cost no memory: then no dense weight is stored at all.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank.
      density: share of the entries that are free.
      init: ``a`` is uniform in +-1/sqrt(n_in) and ``b`` zero. ``v`` is for ``pretrain`` as ``a`` is, so that the weight starts purely
        sparse, and for ``finetune`` zero, so that the output starts exactly at the base's.
      support: ``uniform``: any positions, kept as int32; ``stratified``: one in each of ``nnz`` equal stretches of the flat weight, made
        again from a seed of eight bytes. The paper's is uniform.

    Raises:
      ValueError: an unknown choice, a density outside (0, 1], or (at a site) a rank above its smaller dimension, a weight too small for
        the density or too large for int32 positions.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.zeros((20, 10))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.sltrain(rank=2, density=0.1)}))
      >>> int((lr.merge(params, adapters)["layer"]["kernel"] != 0).sum())
      20
    """
    check_choice("sltrain", "init", init, ("pretrain", "finetune"))
    check_choice("sltrain", "support", support, ("uniform", "stratified"))
    check_share("sltrain", "density", density)
    scale = scaling(rank, alpha)

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("sltrain", rank, site)
        nnz = count_entries("sltrain", "density", density, site)
        kept = {"a": a_leaf(site, rank), "b": b_leaf(site, rank), "v": Leaf((nnz,), ("",))}
        if support == "uniform":
            return {**kept, "indices": Leaf((nnz,), ("",), trains=None, dtype=jnp.int32)}
        return {**kept, "seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32)}

    def init_leaves(key: jax.Array, site: Site, given: Given) -> Leaves:
        a_key, v_key, place_key = jax.random.split(key, 3)
        nnz, bound = count_entries("sltrain", "density", density, site), site.n_in**-0.5
        v = jax.random.uniform(v_key, (*site.batch_shape, nnz), minval=-bound, maxval=bound)
        made = {
            "a": random_a(a_key, (*site.batch_shape, site.n_in, rank)),
            "b": jnp.zeros((*site.batch_shape, rank, site.n_out)),
            "v": v if init == "pretrain" else jnp.zeros_like(v),
        }
        if support == "stratified":
            return {**made, "seed": seeded.seeds(place_key, site.batch_shape)}
        draw = lambda key: jnp.sort(jax.random.permutation(key, site.n_in * site.n_out)[:nnz])  # noqa: E731
        return {
            **made,
            "indices": over_batch(draw, len(site.batch))(jax.random.split(place_key, site.batch_shape)).astype(
                jnp.int32
            ),
        }

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> SparseLowRank:
        size, nnz = site.n_in * site.n_out, leaves["v"].shape[-1]
        indices = leaves.get("indices")
        if indices is None:
            indices = over_batch(lambda seed: one_in_each_stretch(seed, size, nnz), len(site.batch))(leaves["seed"])
        sparse = Sparse(indices, leaves["v"], (site.n_in, site.n_out))
        return SparseLowRank(leaves["a"], leaves["b"], sparse, scale)

    return Method(SparseLowRank, leaves, init_leaves, expand, exact_init=init == "finetune")


def one_in_each_stretch(seed: jax.Array, size: int, number: int) -> jax.Array:
    """A random position in each of ``number`` stretches of ``range(size)``, as equal as they can be: ``[number]`` int32, ascending.

    Example:
      >>> one_in_each_stretch(jnp.array([1, 2], jnp.uint32), 6, 6).tolist()
      [0, 1, 2, 3, 4, 5]
    """
    shortest, longer = divmod(size, number)
    which = jnp.arange(number, dtype=jnp.int32)
    length = (shortest + (which < longer)).astype(jnp.uint32)
    start = which * shortest + jnp.minimum(which, longer)
    return start + (seeded.words(seed, (number,)) % length).astype(jnp.int32)
