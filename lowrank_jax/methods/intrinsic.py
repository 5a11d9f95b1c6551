"""Intrinsic dimension: all weights move in one random subspace of a few dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lowrank_jax import seeded
from lowrank_jax.checks import check_choice
from lowrank_jax.fastfood import MAX_SIZE, Projection, project
from lowrank_jax.forms import DenseUpdate, Leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, method
from lowrank_jax.sites import Site


@method
def intrinsic(
    dimension: int,
    projection: Projection = "fastfood",
    per_site_scale: bool = False,
    seed: int = 0,
    normalise: Literal["model", "site"] = "model",
) -> Method:
    """Measuring the Intrinsic Dimension of Objective Landscapes (arXiv 1804.08838), and its structure-aware variant, SAID, of Intrinsic
    Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (arXiv 2012.13255).

    ``W_i = K_i + s_i P_i theta`` where ``theta [d]``, zero at first, is trained and common to all weights of the plan, ``P_i [n_in n_out,
    d]`` is random and frozen, a seed of eight bytes for each weight and each layer of a stack (`lowrank_jax.fastfood`), and ``s_i = 1``.
    With ``per_site_scale`` the scales ``s_i`` are trained too (SAID): one for each weight and layer, m in all, and ``theta`` has
    ``d - m`` numbers. At the start their gradient is zero, because theta is.
    Count: d, whatever the model. Use it to measure how many dimensions a task takes (`lowrank_jax.d90`), or to send an adapter in a
    few numbers.

    It saves parameters and optimizer state, not work: every weight gets a dense update and a dense gradient in each step, as in full
    fine-tuning, beside the projections both ways. Biases and norms are not projected; leave them, or train them with `full`.

    Args:
      dimension: d, scales included. projection: see `lowrank_jax.fastfood`.
      per_site_scale: train a scale for each weight. seed: another subspace for the same key of `lowrank_jax.init`.
      normalise: ``model``: the columns of all P_i together have length 1, so all weights together move by ``|theta|`` and each by its
        share, ``sqrt(D_i / D)``, as in the papers; ``site``: those of each P_i do, so each weight moves by ``|s_i theta|``, as in the
        released code of SAID.

    Reconstructed: each weight, and each layer of a stack, has a projection of its own where the papers cut one of the whole model into
    pieces; and see `lowrank_jax.fastfood`. The papers train everything in the subspace; here it is what the plan names.

    Raises:
      ValueError: a field out of range; a weight of more than 2**31 numbers; when the leaves are counted or made, fewer dimensions than
        scales, or more than weights.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {name: {"kernel": jnp.ones((64, 32))} for name in "qv"}
      >>> plan = lr.plan(params, {".*": intrinsic(100, per_site_scale=True)})
      >>> plan.trainable, jax.tree.map(lambda leaf: leaf.shape, lr.partition(lr.init(jax.random.key(0), params, plan))[0])["q/kernel"]
      (100, {'scale': (1,)})
    """
    _check_whole("dimension", dimension)
    _check_whole("seed", seed)
    if dimension < 1:
        raise ValueError(f"intrinsic(dimension={dimension}): expected a whole number of at least 1.")
    check_choice("intrinsic", "projection", projection, get_args(Projection))
    check_choice("intrinsic", "normalise", normalise, ("model", "site"))

    def leaves(site: Site) -> dict[str, Leaf]:
        if _size(site) > MAX_SIZE:
            raise ValueError(
                f"intrinsic at {site.path}: {site.n_in} x {site.n_out} is more than 2**31 numbers; exclude the weight."
            )
        scale = Leaf((1,), ("",)) if per_site_scale else Leaf((1,), ("",), trains=None)
        return {"scale": scale, "seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        seeds = seeded.fold(seeded.seeds(key, site.batch_shape), seed)
        return {"scale": jnp.ones((*site.batch_shape, 1)), "seed": seeds}

    def shared(sites: tuple[Site, ...]) -> dict[str, Leaf]:
        layers = sum(math.prod(site.batch_shape) for site in sites)
        length = dimension - layers if per_site_scale else dimension
        if length < 1:
            raise ValueError(
                f"intrinsic(dimension={dimension}): the plan has {layers} weights and layers whose scales are among the dimensions. "
                f"Take at least {layers + 1}, or per_site_scale=False."
            )
        if length > (size := _total(sites)):
            raise ValueError(
                f"intrinsic(dimension={dimension}): the adapted weights have only {size} numbers. Take fewer dimensions, or "
                "train the weights themselves (lowrank_jax.full)."
            )
        theta = {"theta": Leaf((length,), ("",))}
        return theta | ({"size": Leaf((), (), trains=None, dtype=jnp.float32)} if normalise == "model" else {})

    def init_shared(key: jax.Array, sites: tuple[Site, ...]) -> Leaves:
        made = {"theta": jnp.zeros(shared(sites)["theta"].shape), "size": jnp.float32(_total(sites))}
        return {name: made[name] for name in shared(sites)}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> DenseUpdate:
        theta = context.shared["theta"].astype(jnp.float32)
        share = jnp.sqrt(_size(site) / context.shared["size"]) if normalise == "model" else 1.0

        def one(own: tuple[jax.Array, jax.Array]) -> jax.Array:
            scale, seed = own
            change = scale.astype(jnp.float32) * share * project(theta, seed, _size(site), projection)
            return change.reshape(site.n_in, site.n_out)

        # A layer at a time: a projection's padded vectors are larger than its result.
        flat = (leaves["scale"].reshape(-1, 1), leaves["seed"].reshape(-1, 2))
        return DenseUpdate(jax.lax.map(one, flat).reshape(*site.batch_shape, site.n_in, site.n_out))

    return Method(DenseUpdate, leaves, init, expand, shared=shared, init_shared=init_shared)


def _size(site: Site) -> int:
    """Numbers in one matrix of the site."""
    return site.n_in * site.n_out


def _total(sites: tuple[Site, ...]) -> int:
    return sum(math.prod(site.batch_shape) * _size(site) for site in sites)


def _check_whole(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"intrinsic({field}={value!r}): expected a whole number.")
