"""S2-LoRA: one trained pair of factors for all weights of a size, and sparse coefficients at each."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, Seen, check_dropout, check_rank, method, scaling
from lowrank_jax.methods.triplets import orthogonality
from lowrank_jax.optim.soft_threshold import soft_threshold
from lowrank_jax.sites import Site


@method
def s2_lora(
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    threshold: float = 1e-4,
    orthogonal: float = 0.1,
) -> Method:
    """S2-LoRA: Sparsely Shared LoRA on Whisper for Child Speech Recognition (arXiv 2309.11756).

    ``y = x K + s * ((x a) * e) b`` where all weights of equal n_in and n_out share one trained pair ``a [n_in, r]``, ``b [r, n_out]`` and
    each has its own coefficients ``e [r]``, zero at first, which are kept sparse: after every update they are drawn towards zero by
    ``threshold`` and stop there exactly.
    Count: ``r (n_in + n_out)`` for each size and ``r`` for each weight. Use it where many weights have the same size (attention) and
    the adapter has to be small, or to read off which weights a task changes.

    Needs `optim.with_methods` around the optimizer, and `lowrank_jax.penalty` in the loss. There is nothing to compact: a zero is four
    bytes, and a direction belongs to all weights of its size. During a step a scanned stack holds a copy of the pair for each layer,
    as LoRA of that rank does.

    Args:
      rank: r. alpha: ``s = alpha / r``; None takes alpha = rank. dropout: on the input of this path, during training.
      threshold: how far a coefficient is drawn at each update: learning rate times weight of the L1 norm; see `sora`.
      orthogonal: weight of ``||a^T a - I||^2`` and ``||b b^T - I||^2``, their mean over all pairs, which makes coefficients comparable.

    The paper has no released code. That sparsity comes from a proximal step, as in SoRA, and not from a gradient of the L1 norm, which
    never gives zeros, is a reconstruction; so are both weights, and the start of ``a`` and ``b``: normal, columns of ``a`` and rows
    of ``b`` of norm about 1, where the orthogonality term is small.

    Raises:
      ValueError: a negative weight, or (at a site) a rank above its smaller dimension.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {name: {"kernel": jnp.ones((8, 8))} for name in "qkvo"}
      >>> lr.plan(params, {".*": s2_lora(rank=2)}).trainable
      40
    """
    scale = scaling(rank, alpha)
    check_dropout("s2_lora", dropout)
    for name, value in (("threshold", threshold), ("orthogonal", orthogonal)):
        if value < 0:
            raise ValueError(f"s2_lora({name}={value}): expected a number of at least 0.")

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("s2_lora", rank, site)
        return {"e": Leaf((rank,), ("rank",))}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        return {"e": jnp.zeros((*site.batch_shape, rank))}

    def shared(sites: tuple[Site, ...]) -> dict[str, Leaf]:
        pairs: dict[str, Leaf] = {}
        for site in sites:
            pairs |= {f"a_{_size(site)}": a_leaf(site, rank), f"b_{_size(site)}": b_leaf(site, rank)}
        return pairs

    def init_shared(key: jax.Array, sites: tuple[Site, ...]) -> Leaves:
        made = {}
        for n, (name, leaf) in enumerate(shared(sites).items()):
            width = leaf.shape[0 if name.startswith("a") else 1]
            made[name] = jax.random.normal(jax.random.fold_in(key, n), leaf.shape) / jnp.sqrt(width)
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        a, b = (context.shared[f"{side}_{_size(site)}"] for side in "ab")
        copies = lambda x: jnp.broadcast_to(x, (*site.batch_shape, *x.shape))  # noqa: E731
        return LowRank(copies(a), copies(b), leaves["e"], scale=scale, dropout=dropout)

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        sizes = {name[2:] for name in context.shared}
        pairs = {size: {side: context.shared[f"{side}_{size}"] for side in "ab"} for size in sorted(sizes)}
        return orthogonal * orthogonality(pairs)

    def transform(total_steps: int) -> optax.GradientTransformation:
        return soft_threshold("e", threshold)

    return Method(
        LowRank,
        leaves,
        init,
        expand,
        shared=shared,
        init_shared=init_shared,
        transform=transform if threshold else None,
        penalty=penalty if orthogonal else None,
    )


def _size(site: Site) -> str:
    return f"{site.n_in}x{site.n_out}"
