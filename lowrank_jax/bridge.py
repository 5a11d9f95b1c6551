"""What the Linen and the NNX bridge share: routes, and one site's call."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import shard
from lowrank_jax.adapters import Adapters, check_params, expand
from lowrank_jax.batching import over_batch
from lowrank_jax.folding import merged_weight
from lowrank_jax.forms import Call, Form, UnsupportedError, apply_rows
from lowrank_jax.layout import Labels
from lowrank_jax.quantized import is_quantized
from lowrank_jax.sites import Site


class Routes(NamedTuple):
    """Forms to apply inside the model, and weights to lay into its parameters."""

    forms: dict[str, Form]
    weights: dict[str, jax.Array]


class Batch(NamedTuple):
    """What a caller says of each row of its batch.

    Attributes:
      rows: ``[batch]`` int32, the adapter of each row in a stack of adapters; None: one adapter for all.
      signals: ``{name: [batch]}``, inputs of methods that weigh each row by something (PETALface: image quality).
    """

    rows: jax.Array | None = None
    signals: Mapping[str, jax.Array] = MappingProxyType({})


def step_key(rng: jax.Array) -> jax.Array:
    """The key of what methods draw once for all sites, from the key of the adapters' dropout."""
    return jax.random.fold_in(rng, np.uint32(zlib.crc32(b"methods")))


def routes(flat: Mapping[str, Any], adapters: Adapters, key: jax.Array | None = None) -> Routes:
    """Divides an adapter's sites between the factored and the dense route."""
    check_params(flat, adapters.plan)
    forms, weights = {}, {}
    for path, form in expand(adapters, key).items():
        entry = adapters.plan.by_path[path]
        if entry.route == "factored":
            forms[path] = form
        elif is_quantized(flat[path]):
            raise UnsupportedError(
                f"{path} is quantised, and {entry.method.name} would make the whole of it dense: its update is as large as the "
                "weight. Leave the weight out of the quantisation, or take a method that acts beside it."
            )
        elif adapters.stacked is None:
            weights[path] = merged_weight(entry, flat[path], form)
        else:
            raise UnsupportedError(
                f"{path}: {entry.method.name} takes the dense route, which cannot differ between the rows of a batch. "
                "Merge it, or serve one adapter at a time."
            )
    return Routes(forms, weights)


def laid_leaves(form: Form, site: Site, stacked: bool) -> tuple[list[jax.Array], Any]:
    """A form's leaves with their axes where a transform slices the weight's, and the treedef that puts a slice together again.

    ``stacked``: the leaves have a leading axis of adapters, which goes behind the site's batch axes.
    """
    leaves, treedef = jax.tree.flatten(form)
    laid = []
    for leaf in leaves:
        if stacked:
            leaf = jnp.moveaxis(leaf, 0, len(site.batch))
        for position, axis in enumerate(site.scanned):
            leaf = jnp.moveaxis(leaf, position, axis)
        laid.append(leaf)
    return laid, treedef


def check_batch(rows: Any, signals: Mapping[str, Any] | None, adapters: Adapters) -> Batch:
    """Raises a ValueError unless rows come with a stack of adapters."""
    if (rows is None) != (adapters.stacked is None):
        raise ValueError(
            "rows and a stack of adapters go together: pass rows=[...] with lowrank_jax.stack([...]), or neither of them."
        )
    return Batch(rows, MappingProxyType({name: jnp.asarray(value) for name, value in (signals or {}).items()}))


def check_used(laid: Collection[str], used: Collection[str], unused: str) -> None:
    """Raises a ValueError that names an adapter the call did not apply, unless ``unused='ignore'``."""
    if unused not in ("error", "ignore"):
        raise ValueError(f"unused={unused!r}: expected 'error' or 'ignore'.")
    missed = [path for path in laid if path not in used]
    if missed and unused == "error":
        raise ValueError(
            f"The adapter of {missed[0]} was not applied: this call does not use the weight, or not through a registered module "
            f"({len(missed)} of {len(laid)} sites). Exclude it from the plan, register its module, or pass unused='ignore'."
        )


def adapt_matmul(
    form: Form, labels: Labels, x: jax.Array, y: jax.Array, weight: jax.Array, bias: Any, rng: Any, batch: Batch
) -> jax.Array:
    """The output of one matmul with its adapter, in the matmul's own layout."""
    order = labels.batch + labels.inputs + labels.outputs
    kernel = jnp.transpose(weight, [labels.w.index(c) for c in order]) if order != labels.w else weight
    n_batch, n_in = len(labels.batch), len(labels.inputs)
    shape = kernel.shape
    flat_in = _product(shape[n_batch : n_batch + n_in])
    kernel = kernel.reshape(*shape[:n_batch], flat_in, -1)
    if batch.rows is not None and labels.batch:
        raise UnsupportedError(
            "A different adapter on each row is not available for a matmul with batch axes of its own (experts)."
        )
    flat_bias = None if bias is None else bias.reshape(*shape[:n_batch], -1)
    call = Call(
        "dense",
        labels.canonical_input(x).astype(y.dtype),
        labels.canonical_output(y),
        kernel,
        _batched_matmul,
        rng,
        flat_bias,
    )
    return labels.output(run(form, call, batch), weight.shape)


def run(form: Form, call: Call, batch: Batch) -> jax.Array:
    """A form on a call, for the whole batch or with a different adapter for each row."""
    call = call._replace(signals=batch.signals)
    form = shard.whole(form)
    return form.apply(call) if batch.rows is None else apply_rows(form, batch.rows, call)


def embed_call(ids: jax.Array, y: jax.Array, table: jax.Array) -> Call:
    """The call of an embedding lookup."""
    return Call("embed", ids, y, table, lambda ids, w: jnp.take(w, ids, axis=0))


def conv_call(
    x: jax.Array,
    y: jax.Array,
    kernel: jax.Array,
    bias: Any,
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
    rng: Any,
) -> Call:
    """The call of a convolution; ``convolve(x, kernel)`` runs the module with another kernel and no bias."""
    window = kernel.shape[:-1]

    def linear(x: jax.Array, w: jax.Array) -> jax.Array:
        return convolve(x, w.reshape(*window, w.shape[-1]))

    return Call("conv", x, y, kernel.reshape(-1, kernel.shape[-1]), linear, rng, bias)


def _batched_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [*batch, ..., n] @ w [*batch, n, k]``."""
    return over_batch(jnp.matmul, w.ndim - 2)(x, w)


def _product(sizes: tuple[int, ...]) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out
