"""MoSA: a bottleneck adapter split at random into sparse experts that take turns in training."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import seeded
from lowrank_jax.batching import over_batch
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Form, Leaf
from lowrank_jax.forms.bottleneck import ACTIVATIONS
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, method
from lowrank_jax.methods.bottleneck import bottleneck
from lowrank_jax.methods.bottleneck_leaves import bottleneck_leaves, check_width, width_at
from lowrank_jax.sites import Site


@method
def mosa(
    width: int | None = None,
    reduction: float = 12,
    experts: int = 4,
    share: Literal["down", "up"] | None = "down",
    activation: Literal["gelu", "relu", "silu", "tanh"] | None = "gelu",
    position: Literal["parallel", "sequential"] = "sequential",
    scale: float = 0.1,
    bias: bool = True,
    dropout: float = 0.1,
) -> Method:
    """MoSA: Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training (arXiv 2312.02923).

    The adapter ``s (act(u D + c) U + e)`` of `bottleneck` with the entries of ``U`` dealt out at random to N experts, an equal part each.
    A training step draws an expert i at every weight, which acts with ``U_i``: its own entries as they are, the others as they started.
    Evaluation uses all of ``U``. For small data sets, where the plain adapter overfits: same size, same cost, regularised.
    Count: ``m (n + n_out)``, with biases ``m + n_out`` more.

    Training needs randomness, ``rngs={"dropout": key}``; without it the step trains the whole adapter. The paper runs each batch
    through the model twice, with two keys, and adds `lowrank_jax.symmetric_kl` of the two outputs to the loss of the first.

    The paper keeps N copies of ``U``, lets the gradient of copy i through on mask i only, and adds them up at the end. Since the masks
    do not overlap, one array holds all that the copies ever differ by, and reading copy i from it keeps the masks against momentum and
    weight decay too, which masked gradients do not. Masks are made again from a seed. Two simplifications: of every N neighbouring
    entries each expert gets one; and biases, dense in the paper, are common to the experts instead of averaged over their copies.

    Args:
      width: m; None: ``round(n / reduction)``. reduction: of the width; 12 in the paper (64 of 768), ignored where it is given.
      experts: N; 1 is the plain adapter.
      share: the projection that stays dense: ``down`` (D; the paper's hierarchical strategy), ``up`` (U), or None: both are split, and
        drawn independently.
      activation, position, scale, bias, dropout: as in `bottleneck`; scale and dropout are the release's.

    Raises:
      ValueError: an unknown choice, no experts, or a width below 1, given or (at a site) left by the reduction.

    Example:
      >>> mosa(experts=2).name
      'mosa'
    """
    check_width("mosa", width, reduction)
    if activation is not None:
        check_choice("mosa", "activation", activation, tuple(ACTIVATIONS))
    check_choice("mosa", "position", position, ("parallel", "sequential"))
    check_dropout("mosa", dropout)
    if share is not None:
        check_choice("mosa", "share", share, ("down", "up"))
    if experts < 1:
        raise ValueError(f"mosa(experts={experts}): expected at least 1.")
    plain = bottleneck(width, reduction, activation, position, scale, bias, dropout, init="zero_up")
    split = [name for name in ("down", "up") if name != share]

    def leaves(site: Site) -> dict[str, Leaf]:
        m = width_at("mosa", site, position, width, reduction)
        return {
            **bottleneck_leaves(site, position, m, bias),
            "seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32),
        }

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        made = {name: jnp.zeros((*site.batch_shape, *leaf.shape)) for name, leaf in leaves(site).items()}
        made["seed"] = seeded.seeds(key, site.batch_shape)
        return made | {"down": over_batch(_first_down, len(site.batch))(made["seed"], made["down"])}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Form:
        own = dict(leaves)
        if context.key is not None:
            key = jax.random.fold_in(context.key, np.uint32(zlib.crc32(site.path.encode())))
            for n, name in enumerate(split):
                drawn = jax.random.randint(jax.random.fold_in(key, n), site.batch_shape, 0, experts)
                start = (
                    over_batch(_first_down, len(site.batch))(leaves["seed"], own[name])
                    if name == "down"
                    else jnp.zeros_like(own[name])
                )
                of_one = lambda seed, x, n=n: owners(seeded.fold(seed, n), x.shape, experts)  # noqa: E731
                mask = over_batch(of_one, len(site.batch))(leaves["seed"], own[name])
                own[name] = jnp.where(mask == drawn[..., None, None], own[name], start.astype(own[name].dtype))
        return plain.expand(site, own, context)

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        return plain, {name: value for name, value in leaves.items() if name != "seed"}

    return Method(plain.form, leaves, init, expand, compact=compact)


def owners(seed: jax.Array, shape: tuple[int, ...], experts: int) -> jax.Array:
    """Which expert each entry belongs to, int32: a random permutation of the experts over every ``experts`` entries."""
    size = int(np.prod(shape))
    words = seeded.words(seed, (-(-size // experts), experts))
    return jnp.argsort(words, axis=-1).reshape(-1)[:size].reshape(shape)


def _first_down(seed: jax.Array, like: jax.Array) -> jax.Array:
    return seeded.uniform(seeded.fold(seed, 2), like.shape) / math.sqrt(like.shape[0])
