"""SaRA: fine-tuning the entries of a weight that matter least, kept low-rank by a nuclear norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.forms import Leaf, Sparse
from lowrank_jax.methods.base import Context, Given, Leaves, Method, Seen, build, method
from lowrank_jax.methods.entries import check_share, check_size, count_entries
from lowrank_jax.methods.nuclear import nuclear_norm, of_one
from lowrank_jax.methods.ranks import of_stack
from lowrank_jax.methods.sparse_update import sparse_update
from lowrank_jax.sites import Site


@method
def sara(
    fraction: float = 0.1,
    threshold: float | None = None,
    progressive: float = 0.5,
    nuclear: float = 5e-4,
    nuclear_above: int = 64,
    entries: int | tuple[int, ...] | None = None,
    place: tuple[int, int] | None = None,
) -> Method:
    """SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation (arXiv 2409.06633).

    The smallest entries of a pre-trained weight hardly act; training them alone learns a task and forgets little of the rest.
    ``K = K0 (1 - M) + scatter(p)`` with ``M = |K0| < threshold`` and ``p [nnz]``, trained, at first ``K0[M]``: so the output starts exactly
    at the base's. The frozen ``indices [nnz]`` int32 and ``p0 = K0[M]`` make an update of it, ``scatter(p - p0)``. From
    ``progressive`` of the run on ``p`` is frozen, and what is still below the threshold gets a fresh ``p2 [nnz]``, zero at first, with
    fresh moments of the optimizer: ``scatter(p + (|p| < threshold) p2 - p0)``. Each step adds ``nuclear * ||K M||_*`` of one weight, drawn
    at random, to the loss; its gradient is the subgradient ``U V^T`` of smallest norm (no direction of a zero singular value), at the
    entries.
    Count: ``nnz``, in the second stage the same, of which those still below learn.

    For a change that should keep what the model knows. The gradient of a layer is formed densely, one layer at a time, and gathered.
    After training `lowrank_jax.compact` keeps the positions and the sum of what is added there.
    The published learning rate is ``1e-3 * exp(-350 threshold)`` with AdamW. Weight decay draws ``p`` to zero, as in the release, and
    ``p2`` to zero too, which is where the first stage ended (there the release draws on to zero); the release skips the update at the
    change of stage and starts from ``|p|``, this does neither.

    Args:
      fraction: share of each weight that is trained, its smallest ``floor(fraction * n_in * n_out)`` entries; the threshold is then the
        largest of them.
      threshold: instead of a fraction: one threshold for all weights, whose entries are counted when the plan is made. 2e-3 in the
        release. A stack is padded to the layer with the most.
      progressive: where in the run the second stage begins; 1: never.
      nuclear: weight of the penalty; 0: none. nuclear_above: it looks at weights whose smaller dimension is above this (dense weights and
        embeddings; each layer of a stack is one).
      entries, place: set by the plan where there is a threshold: entries at each layer; this weight's number among those the penalty draws
        from, and their number.

    Raises:
      ValueError: a fraction outside (0, 1], a threshold that is not positive, ``progressive`` outside (0, 1], a negative ``nuclear``, or
        (at a site) a weight too small for the fraction or too large for int32 positions.

    Example:
      >>> import lowrank_jax as lr
      >>> plan = lr.plan({"x": {"kernel": jnp.array([[0.1, -2.0], [0.01, 3.0]])}}, {"x": lr.sara(threshold=0.2)})
      >>> plan.trainable
      2
    """
    check_share("sara", "fraction", fraction)
    if threshold is not None and not threshold > 0:
        raise ValueError(f"sara(threshold={threshold}): expected a positive magnitude, or None.")
    if not 0 < progressive <= 1:
        raise ValueError(f"sara(progressive={progressive}): expected a fraction of the run in (0, 1].")
    if not nuclear >= 0:
        raise ValueError(f"sara(nuclear={nuclear}): expected a weight of at least 0.")

    def counts(site: Site) -> np.ndarray:
        """Entries at each layer."""
        check_size("sara", site)
        each = count_entries("sara", "fraction", fraction, site) if entries is None else entries
        return np.broadcast_to(np.asarray(each), (math.prod(site.batch_shape),))

    def length(site: Site) -> int:
        return max(int(counts(site).max()), 1)

    def leaves(site: Site) -> dict[str, Leaf]:
        shape, count = (length(site),), int(counts(site).sum())
        kept = {
            "indices": Leaf(shape, ("",), trains=None, dtype=jnp.int32),
            "p": Leaf(shape, ("",), trains=(0.0, float(progressive)), count=count),
            "p0": Leaf(shape, ("",), trains=None),
        }
        if progressive < 1:
            kept["p2"] = Leaf(shape, ("",), trains=(float(progressive), 1.0), count=count)
        return kept

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        flat = given.need("kernel").reshape(*site.batch_shape, -1)
        smallest = jnp.sort(jax.lax.top_k(-jnp.abs(flat), length(site))[1], axis=-1)
        p = jnp.take_along_axis(flat, smallest, axis=-1)
        made = {"indices": smallest.astype(jnp.int32), "p": p, "p0": p}
        return made if progressive == 1 else {**made, "p2": jnp.zeros_like(p)}

    def update(leaves: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """What is added at the entries, and ``K M`` there."""
        p, p0 = (leaves[name].astype(jnp.float32) for name in ("p", "p0"))
        largest = jnp.abs(p0).max(-1, keepdims=True)

        def below(p: jax.Array) -> jax.Array:
            return (jnp.abs(p) <= largest if threshold is None else jnp.abs(p) < threshold).astype(jnp.float32)

        if "p2" in leaves:
            p = p + below(p) * leaves["p2"]
        # Products and no `where`: what is not finite has to show. Beyond a layer's own entries a stack is padded.
        return below(p0) * (p - p0), below(p0) * p

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Sparse:
        return Sparse(leaves["indices"], update(leaves)[0], shape=(site.n_in, site.n_out))

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        among = [s for s in seen.values() if _drawn_from(s.site, nuclear_above)]
        if not among:
            return jnp.float32(0)

        def norm_of(s: Seen) -> Callable[[jax.Array | int], jax.Array]:
            values = update(s.leaves)[1].reshape(-1, s.leaves["p"].shape[-1])
            indices = s.leaves["indices"].reshape(values.shape)
            return lambda layer: nuclear_norm((s.site.n_in, s.site.n_out), values[layer], indices[layer])

        sizes = [math.prod(s.site.batch_shape) for s in among]
        return nuclear * of_one([norm_of(s) for s in among], sizes, context.key, place)

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        values = np.asarray(update(leaves)[0])
        return sparse_update(values.shape[-1]), {"indices": leaves["indices"], "values": values}

    def allocate(sites: Mapping[str, Site], given: Mapping[str, Given]) -> dict[str, Method]:
        assert threshold is not None
        sizes = {p: math.prod(s.batch_shape) * _drawn_from(s, nuclear_above) for p, s in sites.items()}
        own, first = {}, 0
        for path, site in sites.items():
            below = np.asarray((jnp.abs(given[path].need("kernel")) < threshold).sum((-2, -1))).reshape(-1)
            fields = {"entries": of_stack(below.tolist(), site), "place": (first, sum(sizes.values()))}
            own[path] = build("sara", {**config, **fields})
            first += sizes[path]
        return own

    config = {
        "fraction": fraction,
        "threshold": threshold,
        "progressive": progressive,
        "nuclear": nuclear,
        "nuclear_above": nuclear_above,
    }
    return Method(Sparse, leaves, init, expand, penalty=penalty if nuclear else None, compact=compact, needs=frozenset({"kernel"}),
                  allocate=allocate if threshold is not None and entries is None else None)  # fmt: skip


def _drawn_from(site: Site, above: int) -> bool:
    return site.kind != "conv" and site.max_rank > above
