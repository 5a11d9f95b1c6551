"""NOLA: low-rank factors that are trained combinations of random matrices, which a seed stands for."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import seeded
from lowrank_jax.batching import over_batch
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, check_rank, method, scaling
from lowrank_jax.sites import Site

_AT_ONCE = 16  # bases made at a time


@method
def nola(rank: int = 8, bases: int = 512, alpha: float | None = None, dropout: float = 0.0) -> Method:
    """NOLA: Networks as Linear Combination of Low Rank Random Basis (arXiv 2310.02556).

    ``y = x K + s * (x a) b`` with ``a = a0 + sum_i u_i a_i`` ``[n_in, r]`` and ``b = sum_i v_i b_i`` ``[r, n_out]``. Only the coefficients
    ``u [k]`` and ``v [k]`` are trained, both zero at first; ``a0`` is frozen and keeps that start from being a saddle. Each
    weight has its own random ``a0``, ``a_i``, ``b_i``, made of a seed of eight bytes.
    Count: ``2 k``, whatever the rank and the size of the weight. Use it to go below LoRA of rank 1, or to fix the size of an adapter
    in advance.

    The factors are made once a step, 16 bases at a time, and the bases once more in the backward pass: nothing of their size is kept.
    That is ``2 k r (n_in + n_out)`` random numbers a weight and step, whatever the batch, so with k = 512 and a small batch a step can
    take more than 1.25 times LoRA's of the same rank; fewer bases cost in proportion less.

    Args:
      rank: r. bases: k, for each factor. alpha: ``s = alpha / r``; None takes alpha = rank. dropout: on the input of this path.

    As in the release, bases are uniform in +-1/sqrt(k) and ``a0`` in +-1/sqrt(n_in); the numbers themselves are not the release's.

    Raises:
      ValueError: fewer than one basis, or (at a site) a rank above its smaller dimension.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.ones((64, 32))}}
      >>> lr.plan(params, {"x": nola(rank=8, bases=100)}).trainable
      200
    """
    scale = scaling(rank, alpha)
    check_dropout("nola", dropout)
    if bases < 1:
        raise ValueError(f"nola(bases={bases}): expected at least one.")

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank("nola", rank, site)
        coefficients = Leaf((bases,), ("basis",))
        return {"u": coefficients, "v": coefficients, "seed": Leaf((2,), ("",), trains=None, dtype=jnp.uint32)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        zero = jnp.zeros((*site.batch_shape, bases))
        return {"u": zero, "v": zero, "seed": seeded.seeds(key, site.batch_shape)}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        def factors(u: jax.Array, v: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
            a0 = seeded.uniform(seeded.fold(seed, 0), (site.n_in, rank)) / math.sqrt(site.n_in)
            a = combination(u, seeded.fold(seed, 1), (site.n_in, rank))
            return a0 + a, combination(v, seeded.fold(seed, 2), (rank, site.n_out))

        a, b = over_batch(factors, len(site.batch))(leaves["u"], leaves["v"], leaves["seed"])
        return LowRank(a, b, scale=scale, dropout=dropout)

    return Method(LowRank, leaves, init, expand)


def combination(coefficients: jax.Array, seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``sum_i coefficients[i] * basis_i / sqrt(k)`` of k uniform random bases, ``shape`` float32.

    A few bases exist at a time, in the backward pass as in the forward.
    """
    k = coefficients.shape[0]
    size = min(k, _AT_ONCE)
    count = -(-k // size)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(start: jax.Array, part: jax.Array) -> jax.Array:
        return jnp.tensordot(part, seeded.uniform(seed, (size, *shape), (start, *(0 for _ in shape))), 1)

    # The last part is padded with bases that take no part.
    parts = jnp.pad(coefficients.astype(jnp.float32) / math.sqrt(k), (0, size * count - k)).reshape(count, size)
    step = lambda total, part: (total + some(*part), None)  # noqa: E731
    return lax.scan(step, jnp.zeros(shape, jnp.float32), (jnp.arange(count) * size, parts))[0]
