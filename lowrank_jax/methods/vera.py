"""VeRA: two frozen random matrices common to all weights, and two trained vectors at each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lowrank_jax import seeded
from lowrank_jax.forms import Entries, Leaf, RandomBases
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, method
from lowrank_jax.sites import Site


@method
def vera(rank: int = 256, d_initial: float = 0.1, dropout: float = 0.0, store: bool = False) -> Method:
    """VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

    ``y = x K + (((x a) d) b) c`` with ``a [n_in, r]`` and ``b [r, n_out]`` random, frozen and common to all weights, which take the
    corner that fits them; ``d [r]`` and ``c [n_out]`` are trained, ``c`` zero at first.
    Count: ``r + n_out``. Use it where an adapter has to be tiny, such as one for every user; it wants a large rank, which may exceed
    the weight's dimensions, and a learning rate some ten times LoRA's.

    ``a`` and ``b`` are not stored but made of a seed at every use (`lowrank_jax.seeded`), a layer at a time, so a stack of layers holds
    one copy at most. The backward pass keeps ``x a``, not ``x``.

    Args:
      rank: r. d_initial: what ``d`` starts from. dropout: on the input of this path, during training.
      store: keep ``a`` and ``b`` as leaves instead of the seed, for adapters of other libraries, whose generators cannot be run here.
        A scanned stack then holds a copy for each of its layers during a step.

    The entries are uniform in +-sqrt(6 / n_in) and +-sqrt(6 / r): He's bound with each weight's own n_in, where PEFT, as ``store`` does
    too, takes that of the widest.

    Raises:
      ValueError: a rank below 1, or ``dropout`` outside [0, 1).

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.ones((8, 5))}, "y": {"kernel": jnp.ones((4, 6))}}
      >>> lr.plan(params, {".*": vera(rank=16)}).trainable
      43
    """
    if rank < 1:
        raise ValueError(f"vera(rank={rank}): expected a rank of at least 1.")
    check_dropout("vera", dropout)

    def leaves(site: Site) -> dict[str, Leaf]:
        return {"d": Leaf((rank,), ("rank",)), "c": Leaf((site.n_out,), ("out",))}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        return {"d": jnp.full((*site.batch_shape, rank), d_initial), "c": jnp.zeros((*site.batch_shape, site.n_out))}

    def shared(sites: tuple[Site, ...]) -> dict[str, Leaf]:
        if not store:
            return {"seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32)}
        n_in, n_out = max(s.n_in for s in sites), max(s.n_out for s in sites)
        return {"a": Leaf((n_in, rank), ("", ""), trains=None), "b": Leaf((rank, n_out), ("", ""), trains=None)}

    def init_shared(key: jax.Array, sites: tuple[Site, ...]) -> Leaves:
        seed = seeded.seeds(key)
        if not store:
            return {"seed": seed}
        shapes = {name: leaf.shape for name, leaf in shared(sites).items()}
        return {
            name: seeded.uniform(seeded.fold(seed, n), shape) * math.sqrt(6 / shape[0])
            for n, (name, shape) in enumerate(shapes.items())
        }

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> RandomBases:
        corner = {"a": (slice(site.n_in), None), "b": (slice(None), slice(site.n_out)), "seed": ()}
        kept = {name: part[corner[name]] for name, part in context.shared.items()}
        kept = {name: jnp.broadcast_to(part, (*site.batch_shape, *part.shape)) for name, part in kept.items()}
        return RandomBases(
            leaves["d"][..., None, :],
            leaves["c"][..., None, :],
            kept.get("seed"),
            kept.get("a"),
            kept.get("b"),
            d=site.n_in,
            entries=Entries(math.sqrt(6 / site.n_in), math.sqrt(6 / rank)),
            at_once=rank,
            dropout=dropout,
        )

    return Method(RandomBases, leaves, init, expand, shared=shared, init_shared=init_shared)
