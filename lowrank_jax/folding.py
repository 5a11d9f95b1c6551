"""Adapters and plain parameters: merging into them, and moving anchors in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters, check_params, expand, spread
from lowrank_jax.forms import Dense, Form, LowRank, UnsupportedError
from lowrank_jax.plan import Entry
from lowrank_jax.sites import flatten, with_leaves


def merge(params: Any, adapters: Adapters) -> Any:
    """Plain parameters that act like the base with the adapter: any Flax code runs them.

    Computed in float32 whatever the storage dtype, then rounded once. Neither argument is changed.

    Args:
      params: the base the adapter belongs to (folded with it, if it is folded).

    Raises:
      ValueError: a weight that would not be finite (named; nothing is returned), or parameters of another model.
      UnsupportedError: a form without a dense update, or a stack of adapters.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.zeros((2, 2))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=1)}))
      >>> lr.merge(params, adapters)["layer"]["kernel"].tolist()
      [[0.0, 0.0], [0.0, 0.0]]
    """
    if adapters.stacked is not None:
        raise UnsupportedError("merge takes one adapter; pick one of the stack with lowrank_jax.take.")
    flat = flatten(params)
    check_params(flat, adapters.plan)
    new: dict[str, Any] = {}
    for path, form in expand(adapters).items():
        entry = adapters.plan.by_path[path]
        new[path] = merged_weight(entry, flat[path], form)
        if entry.site.kind == "param":
            continue
        bias_path = f"{entry.site.module}/bias".lstrip("/")
        bias = new.get(bias_path, flat.get(bias_path))
        flat_bias = None if bias is None else bias.reshape(*entry.site.batch_shape, -1)
        change = form.delta_bias(entry.site.canonical(flat[path]), flat_bias)
        if change is None:
            continue
        if bias is None:
            raise UnsupportedError(
                f"{path}: {entry.method.name} adds a bias, and the module has none to merge it into. Keep the adapter, or make the model "
                "with a bias."
            )
        new[bias_path] = (bias.astype(jnp.float32) + change.reshape(bias.shape)).astype(bias.dtype)
    _refuse_nonfinite(new)
    return with_leaves(params, new)


def merged_weight(entry: Entry, weight: jax.Array, form: Form) -> jax.Array:
    """One weight plus its form's update, in the weight's own layout and dtype."""
    if entry.site.kind == "param":
        return form.weight.astype(weight.dtype)  # type: ignore[attr-defined]
    matrix = entry.site.canonical(weight)
    if isinstance(form, Dense):
        whole = form.weight
        if entry.layers is not None:  # the form's other layers are zeros, which for a whole weight is not "no change"
            rows = jnp.asarray(entry.layers)
            whole = matrix.astype(whole.dtype).at[rows].set(whole[rows])
        return entry.site.original(whole).astype(weight.dtype)
    # A TPU multiplies float32 as bfloat16 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return entry.site.original(matrix.astype(jnp.float32) + form.delta(matrix)).astype(weight.dtype)


def add_low_rank(params: Any, adapters: Adapters, entries: Sequence[Entry] | None = None) -> Any:
    """`merge` for training loops: under jit, with ``params`` donated, in place, and one matrix of a stack at a time.

    No dense update of a whole stack exists; nothing is refused for not being finite. Each weight is added to in float32 and rounded.

    Args:
      entries: of the plan, whose methods expand to `LowRank`; None: all.

    Raises:
      UnsupportedError: another form (named).

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.eye(2)}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=1)}))
      >>> add_low_rank(params, adapters)["layer"]["kernel"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    flat, forms, new = flatten(params), expand(adapters), {}
    for entry in adapters.plan.entries if entries is None else entries:
        path = entry.site.path
        form = forms[path]
        if not isinstance(form, LowRank):
            raise UnsupportedError(f"{path}: {entry.method.name} is no low-rank update; expected LowRank. Use merge.")
        new[path] = _with_products(entry, flat[path], *form.pair())
    return with_leaves(params, new)


def _with_products(entry: Entry, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``weight`` plus ``a @ b``, one matrix after another."""
    site = entry.site
    matrices = site.canonical(weight).reshape(-1, site.n_in, site.n_out)
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))

    def one(n: jax.Array, matrices: jax.Array) -> jax.Array:
        update = jnp.matmul(a[n], b[n], precision="highest")
        return matrices.at[n].set((matrices[n] + update).astype(matrices.dtype))

    matrices = jax.lax.fori_loop(0, len(matrices), one, matrices)
    return site.original(matrices.reshape(*site.batch_shape, site.n_in, site.n_out))


def fold(params: Any, adapters: Adapters) -> tuple[Any, Adapters]:
    """Moves every anchor into a copy of the base, so that training and serving no longer pay for it.

    Args:
      params: the base. Untouched: the result shares every weight that has no anchor.

    Returns:
      ``(folded_params, folded_adapters)``, which together act like the arguments, to rounding. Methods without an anchor
      are left as they are. The folded adapter only fits the folded base.

    Raises:
      ValueError: already folded, or a weight that would not be finite.
    """
    if adapters.folded:
        raise ValueError("fold: these adapters are folded already.")
    return _shift(params, adapters, lambda w, d: w - d), adapters.replace(folded=True)


def unfold(params: Any, adapters: Adapters) -> tuple[Any, Adapters]:
    """Inverse of `fold`, to rounding in the base's dtype. Keep the original base where bits matter; folding leaves it alone.

    Raises:
      ValueError: not folded.
    """
    if not adapters.folded:
        raise ValueError("unfold: these adapters are not folded.")
    return _shift(params, adapters, lambda w, d: w + d), adapters.replace(folded=False)


def _shift(params: Any, adapters: Adapters, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    if adapters.stacked is not None:
        raise UnsupportedError("A stack of adapters cannot be folded: its rows share one base.")
    flat = flatten(params)
    check_params(flat, adapters.plan)
    new = {}
    for entry in adapters.plan.entries:
        if entry.method.anchor is None:
            continue
        weight = flat[entry.site.path]
        anchor = spread(entry, entry.method.anchor(entry.local, adapters.sites[entry.site.path]))
        matrix = entry.site.canonical(weight).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            new[entry.site.path] = entry.site.original(combine(matrix, anchor.delta(matrix))).astype(weight.dtype)
    _refuse_nonfinite(new)
    return with_leaves(params, new)


def _refuse_nonfinite(new: dict[str, Any]) -> None:
    for path, weight in new.items():
        if isinstance(weight, jax.core.Tracer) or not jnp.issubdtype(weight.dtype, jnp.floating):
            continue
        if not bool(jnp.isfinite(weight).all()):
            raise ValueError(
                f"{path}: the merged weight is not finite. The adapter or the base holds NaN or inf there; nothing was merged."
            )
