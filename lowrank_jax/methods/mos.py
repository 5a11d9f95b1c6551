"""MoS: the factors of all layers are put together from shards of common pools."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax import seeded
from lowrank_jax.batching import over_batch
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import (
    Context,
    Given,
    Leaves,
    Method,
    check_dropout,
    check_rank,
    method,
    random_a,
    scaling,
)
from lowrank_jax.sites import LAYER_NUMBER, Site


@method
def mos(
    rank: int = 8,
    budget: int = 2,
    shards: int = 4,
    private: int = 1,
    alpha: float | None = None,
    dropout: float = 0.0,
    dissociate: bool = True,
    pools: Literal["module", "size"] = "module",
) -> Method:
    """MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards (arXiv 2410.00938).

    ``y = x K + s * (x a) b`` with ``a [n_in, r]`` and ``b [r, n_out]``. ``p`` of the r directions are a layer's own. The others are put
    together from ``l`` shards each, taken from a pool for ``a`` and a pool for ``b`` that the L layers of a module type (all query
    projections) have in common, of ``(e - p) L l`` shards. Which ones is drawn once, from a seed of eight bytes that each layer keeps,
    without repeating a shard before all are used. Pools and own directions are trained, the ``b`` side zero at first.
    Count: ``e L (n_in + n_out)``, that of LoRA of rank ``e``, while the update has rank ``r``. Use it for many small adapters on one base.

    What tells the layers apart, against pure sharing: the subset drawn (``rank`` below the pool's ``(e - p) L + p``), pairs drawn apart
    (``dissociate``), vectors in shards (``shards``), own directions (``private``). With ``rank = budget = private`` it is LoRA.
    Layers are those of a scanned stack, or the number in the path.

    Args:
      rank: r. budget: e. shards: l, to a vector; where it does not divide a dimension, the last shard of a vector is cut.
      private: p, at most ``budget``. alpha: ``s = alpha / r``; None takes alpha = rank. dropout: on the input of this path.
      dissociate: draw the shards of ``b`` apart from those of ``a``. Otherwise shard i of ``a`` always meets shard i of ``b``.
      pools: ``module``: one pair for each module type, as in the paper; ``size``: one for all weights of a width.

    A shard of ``a`` starts uniform in +-1/sqrt(n_in). The release's fixed scaling vectors, which it sets to one, are left out.

    Raises:
      ValueError: an unknown choice, fields that contradict each other, (at a site) a rank above its smaller dimension, or pools of
        unequal size that ``dissociate=False`` cannot pair.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {f"layers_{n}": {"query": {"kernel": jnp.ones((16, 16))}} for n in range(12)}
      >>> lr.plan(params, {".*": mos(rank=8, budget=2)}).trainable == lr.plan(params, {".*": lr.lora(rank=2)}).trainable
      True
    """
    scale = scaling(rank, alpha)
    check_choice("mos", "pools", pools, ("module", "size"))
    check_dropout("mos", dropout)
    if shards < 1:
        raise ValueError(f"mos(shards={shards}): expected at least 1.")
    if not 1 <= budget <= rank:
        raise ValueError(f"mos(budget={budget}): expected a rank between 1 and the rank of the update, {rank}.")
    if not 0 <= private <= budget or (private == budget < rank):
        raise ValueError(
            f"mos(private={private}): expected at least 0 and less than budget={budget}, or all equal to rank={rank}."
        )
    drawn = rank - private

    def names(site: Site) -> dict[str, str]:
        # Without the layer's number and what joins it, the path is the module type's.
        number = LAYER_NUMBER.search(site.path)
        own = site.path if number is None else site.path[: max(number.start() - 1, 0)] + site.path[number.end() :]
        kind = "all" if pools == "size" else own.replace("/", ".")
        return {"a": f"{kind}.a{site.n_in}", "b": f"{kind}.b{site.n_out}"}

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("mos", rank, site)
        own = {"a": a_leaf(site, private), "b": b_leaf(site, private)} if private else {}
        return own | ({"seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32)} if drawn else {})

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a_key, seed_key = jax.random.split(key)
        made = {
            "a": random_a(a_key, (*site.batch_shape, site.n_in, private)),
            "b": jnp.zeros((*site.batch_shape, private, site.n_out)),
            "seed": seeded.seeds(seed_key, site.batch_shape),
        }
        return {name: made[name] for name in leaves(site)}

    def shared(sites: tuple[Site, ...]) -> dict[str, Leaf]:
        counts: dict[str, tuple[int, int]] = {}
        for site in sites if drawn else ():
            for name, n in zip(names(site).values(), (site.n_in, site.n_out), strict=True):
                counts[name] = (counts.get(name, (0, n))[0] + math.prod(site.batch_shape), n)
        return {
            name: Leaf(((budget - private) * layers * shards, -(-n // shards)), ("", ""))
            for name, (layers, n) in counts.items()
        }

    def init_shared(key: jax.Array, sites: tuple[Site, ...]) -> Leaves:
        widths = {names(site)["a"]: site.n_in for site in sites}
        made = {}
        for n, (name, leaf) in enumerate(shared(sites).items()):
            u = jax.random.uniform(jax.random.fold_in(key, n), leaf.shape, minval=-1.0)
            made[name] = u / math.sqrt(widths[name]) if name in widths else jnp.zeros(leaf.shape)
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        parts = [(leaves["a"], leaves["b"])] if private else []
        if drawn:
            pool = {side: context.shared[name] for side, name in names(site).items()}
            if not dissociate and len(pool["a"]) != len(pool["b"]):
                raise ValueError(
                    f"mos at {site.path}: dissociate=False pairs the shards of two pools, but they have {len(pool['a'])} and "
                    f"{len(pool['b'])}. Use pools='module', or give weights of other widths a mos of their own."
                )

            def put_together(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
                of_a = _draw(seeded.fold(seed, 0), len(pool["a"]), drawn * shards)
                of_b = _draw(seeded.fold(seed, 1), len(pool["b"]), drawn * shards) if dissociate else of_a
                rows = lambda side, of, n: pool[side][of].reshape(drawn, -1)[:, :n]  # noqa: E731
                return rows("a", of_a, site.n_in).T, rows("b", of_b, site.n_out)

            parts = [over_batch(put_together, len(site.batch))(leaves["seed"]), *parts]
        a, b = (jnp.concatenate(side, axis) for side, axis in zip(zip(*parts, strict=True), (-1, -2), strict=True))
        return LowRank(a, b, scale=scale, dropout=dropout)

    return Method(LowRank, leaves, init, expand, shared=shared, init_shared=init_shared)


def _draw(seed: jax.Array, size: int, count: int) -> jax.Array:
    """``count`` of the numbers below ``size`` in random order, int32; again from the start when all have been drawn."""
    rounds = [jnp.argsort(seeded.words(seeded.fold(seed, n), (size,))) for n in range(-(-count // size))]
    return jnp.concatenate(rounds)[:count]
