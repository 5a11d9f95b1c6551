"""The small model: whole units cut away, or single entries set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lowrank_jax.loram.units import Kept, take
from lowrank_jax.sites import Site, flatten, hits, with_leaves
from lowrank_jax.sites import sites as find_sites


def prune(params: Any, kept: Mapping[str, Kept]) -> Any:
    """The small model's parameters: kernels cut to what is kept, and the biases of what writes it. Everything else is shared.

    Its configuration has as many heads (of the same width) and features as are kept: for ours, ``num_attention_heads``,
    ``num_key_value_heads``, ``head_dim`` and ``intermediate_size``.
    """
    flat, new = flatten(params), {}
    for path, one in kept.items():
        matrix = one.site.canonical(jnp.asarray(flat[path]))
        new[path] = one.small.original(take(take(matrix, one.inputs, -2), one.outputs, -1))
        bias = flat.get(f"{one.site.module}/bias")
        if bias is not None and one.outputs is not None:
            batch = one.site.batch_shape
            cut = jnp.take_along_axis(jnp.asarray(bias).reshape(*batch, -1), jnp.asarray(one.outputs), axis=-1)
            new[f"{one.site.module}/bias"] = cut.reshape(*batch, *(one.small.shape[a] for a in one.site.outputs))
    return with_leaves(params, new)


def sparsify(params: Any, rules: Mapping[str, float | tuple[int, int]], sites: Mapping[str, Site] | None = None) -> Any:
    """The parameters with the smallest entries of some weights set to zero, to train on; the adapter then serves the whole model as it is.

    Args:
      rules: ``{pattern: share}`` keeps that share of each matrix; ``{pattern: (n, m)}`` keeps n of each m neighbouring inputs of an
        output, such as ``(2, 4)``. A pattern matches the path of a weight or of its module.
      sites: as in `choose`.

    Raises:
      ValueError: a pattern that matches no dense weight, or a share or a group that does not fit.

    Example:
      >>> weight = jnp.array([[1.0, 5.0], [3.0, 2.0]])
      >>> sparsify({"x": {"kernel": weight}}, {"x": (1, 2)})["x"]["kernel"].tolist()
      [[0.0, 5.0], [3.0, 0.0]]
    """
    found = {
        path: site for path, site in (find_sites(params) if sites is None else sites).items() if site.kind == "dense"
    }
    flat, new = flatten(params), {}
    for pattern, keep in rules.items():
        for site in (found[path] for path in hits(f"Rule for {pattern!r}", pattern, found)):
            size = site.n_in * site.n_out
            n, m = keep if isinstance(keep, tuple) else (round(keep * size), size)
            if not 1 <= n <= m or (isinstance(keep, tuple) and site.n_in % m):
                raise ValueError(
                    f"{site.path} has {site.n_in} x {site.n_out} entries: cannot keep {keep} of them. Give a share in (0, 1], or (n, m) "
                    "with m a divisor of its inputs."
                )
            # Outputs first, so that neighbouring inputs are neighbours.
            rows = jnp.swapaxes(site.canonical(jnp.asarray(flat[site.path])), -1, -2)
            groups = rows.reshape(*site.batch_shape, -1, m)
            order = jnp.argsort(jnp.argsort(-jnp.abs(groups), axis=-1), axis=-1)
            rows = jnp.where(order < n, groups, 0).reshape(rows.shape)
            new[site.path] = site.original(jnp.swapaxes(rows, -1, -2))
    return with_leaves(params, new)
