"""SpIEL: a sparse update whose entries move, while training goes on, to where they matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax.batching import over_batch
from lowrank_jax.checks import check_choice
from lowrank_jax.forms import Leaf, Sparse
from lowrank_jax.methods.base import Context, Given, Leaves, Method, build, method
from lowrank_jax.methods.entries import check_share, check_size, count_entries
from lowrank_jax.methods.sparse_update import sparse_update
from lowrank_jax.optim.entry_swaps import flat_positions
from lowrank_jax.optim.spiel import reselect_entries
from lowrank_jax.sites import Site

_LARGEST = 2**24  # float32 holds every whole number up to here


@method
def spiel(
    density: float = 0.01,
    total: int | None = None,
    growth: Literal["momentum", "gradient"] = "momentum",
    every: int = 20,
    first: int = 5,
    share: float = 0.2,
    schedule: Literal["linear", "cosine"] = "linear",
    entries: int | None = None,
) -> Method:
    """SpIEL: Scaling Sparse Fine-Tuning to Large Language Models (arXiv 2401.16405).

    ``y = x (K + scatter(v))`` with ``v [k]`` trained, zero at first, at k positions ``(row, column)``, all different and random at first.
    Every ``every`` updates a share of them, the smallest, give way to positions that promise more: all of them the first time, after
    update ``first``, then a share that falls from ``share`` to nothing (`optim.swap_share`). A dropped entry is the pre-trained one
    again.
    Count: k of each weight. State, not counted: ``row [k]``, ``column [k]``, and for ``momentum`` SM3's accumulators ``row_max [n_in]``,
    ``column_max [n_out]``, all float32. Rows and columns are held as two float32 numbers, not one integer, because they travel with what
    is differentiated.

    ``growth`` says what promises more:

    - ``momentum`` (SpIEL-MA): products of SM3's accumulators. `optim.with_methods` alone does it, inside the compiled step.
    - ``gradient`` (SpIEL-AG): accumulated dense gradients, which no step keeps: call `optim.spiel_reselect` between steps, as
      ``train.finetune`` does. Without those calls the positions stay random.

    Put `optim.scale_by_spiel` in the place of Adam: it gives every entry its own age, or SM3's step. Under another optimizer a new entry
    goes on with the moments of the one whose slot it took, which is an approximation, and positions get moments that nobody reads.
    The paper searches rates from 4e-4 to 2e-3 for ``momentum`` and from 3e-6 to 1e-4 for ``gradient``, with linear decay, a warm-up of 3%
    and batches of 128.

    The gradient of a layer is formed densely, one layer at a time, and gathered. After training `lowrank_jax.compact` keeps the positions
    as int32 and the values. On a mesh a choice looks at the whole weight.

    Args:
      density: share of the entries of each weight: ``k = floor(density * n_in * n_out)``. In the release it is of all parameters of the
        model: give ``total`` for that.
      total: instead: entries of all weights of this rule together, shared out in proportion to their size, rounded down. As many as LoRA
        has: ``r * sum(n_in + n_out)``.
      growth, every, first, share, schedule: see above. For ``gradient`` the caller decides when,
        and ``train.finetune`` goes by these.
      entries: k, set by the plan where there is a total.

    Raises:
      ValueError: a density outside (0, 1], a total, ``every`` or ``first`` below 1, a share outside [0, 1], an unknown choice, or (at a
        site) a weight too small for the density or the total, or too large for its positions.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.zeros((20, 10))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"x": lr.spiel(density=0.1)}))
      >>> adapters.plan.trainable, sorted(lr.partition(adapters)[0]["x/kernel"])
      (20, ['column', 'column_max', 'row', 'row_max', 'v'])
    """
    check_share("spiel", "density", density)
    check_choice("spiel", "growth", growth, ("momentum", "gradient"))
    check_choice("spiel", "schedule", schedule, ("linear", "cosine"))
    for name, value in (("total", total), ("every", every), ("first", first), ("entries", entries)):
        if value is not None and value < 1:
            raise ValueError(f"spiel({name}={value}): expected at least 1.")
    if not 0 <= share <= 1:
        raise ValueError(f"spiel(share={share}): expected a share of the entries in [0, 1].")

    def count(site: Site) -> int:
        check_size("spiel", site)
        if max(site.n_in, site.n_out) > _LARGEST:
            raise ValueError(
                f"spiel at {site.path}: a dimension of {max(site.n_in, site.n_out)} is more than {_LARGEST}; exclude the site."
            )
        return count_entries("spiel", "density", density, site) if entries is None else entries

    def leaves(site: Site) -> dict[str, Leaf]:
        shape = (count(site),)
        held = {name: Leaf(shape, ("",), state=True, dtype=jnp.float32) for name in ("row", "column")}
        if growth == "momentum":
            held["row_max"] = Leaf((site.n_in,), ("in",), state=True, dtype=jnp.float32)
            held["column_max"] = Leaf((site.n_out,), ("out",), state=True, dtype=jnp.float32)
        return {"v": Leaf(shape, ("",)), **held}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        k, size = count(site), site.n_in * site.n_out
        draw = lambda key: jnp.sort(jax.random.choice(key, size, (k,), replace=False))  # noqa: E731
        here = over_batch(draw, len(site.batch))(jax.random.split(key, site.batch_shape))
        row, column = (x.astype(jnp.float32) for x in (here // site.n_out, here % site.n_out))
        zeros = {name: jnp.zeros((*site.batch_shape, *leaf.shape)) for name, leaf in leaves(site).items()}
        return {**zeros, "row": row, "column": column}

    def positions(site: Site, leaves: Mapping[str, Any]) -> jax.Array:
        row, column = (jax.lax.stop_gradient(jnp.asarray(leaves[name])) for name in ("row", "column"))
        return flat_positions(row, column, (site.n_in, site.n_out))

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Sparse:
        return Sparse(positions(site, leaves), leaves["v"], shape=(site.n_in, site.n_out))

    def transform(total_steps: int) -> optax.GradientTransformation:
        return reselect_entries(total_steps, every, first, share, schedule)

    def compact(site: Site, leaves: Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
        kept = {"indices": np.asarray(positions(site, leaves)), "values": leaves["v"]}
        return sparse_update(kept["values"].shape[-1]), kept

    def allocate(sites: Mapping[str, Site], given: Mapping[str, Given]) -> dict[str, Method]:
        assert total is not None
        whole = sum(math.prod(site.shape) for site in sites.values())
        own = {}
        for path, site in sites.items():
            size = site.n_in * site.n_out
            k = total * size // whole
            if not 1 <= k <= size:
                raise ValueError(
                    f"spiel at {path}: total={total} gives it {k} of its {size} entries. Take another total, or exclude the site."
                )
            own[path] = build("spiel", {**config, "entries": k})
        return own

    config = {
        "density": density,
        "total": total,
        "growth": growth,
        "every": every,
        "first": first,
        "share": share,
        "schedule": schedule,
    }
    return Method(Sparse, leaves, init, expand, transform=transform, compact=compact,
                  allocate=allocate if total is not None and entries is None else None)  # fmt: skip
