"""Adapters and plain parameters: merging into them, and moving anchors in and out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters, check_params, expand, spread
from lowrank_jax.forms import Dense, Form, LowRank, UnsupportedError
from lowrank_jax.plan import Entry
from lowrank_jax.quantize import chosen, quantized, quantized_layers
from lowrank_jax.quantized import Quantized, dense, is_quantized, layers
from lowrank_jax.sites import Site, flatten, with_leaves
from lowrank_jax.unread import Unread, read


def merge(params: Any, adapters: Adapters) -> Any:
    """Plain parameters that act like the base with the adapter: any Flax code runs them.

    Computed in float32 whatever the storage dtype, then rounded once. Neither argument is changed. A quantised base comes out dense: its
    rounded weights with the update added exactly, which is what was trained; quantising the result again would round the update too.

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
    new: dict[str, Any] = {path: dense(leaf) for path, leaf in flat.items() if isinstance(leaf, Quantized | Unread)}
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
        _refuse_quantized(path, flat[path], "added to in place")
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


def fold(
    params: Any, adapters: Adapters, *, quantize: Mapping[str, str] | None = None, block: int = 64
) -> tuple[Any, Adapters]:
    """Moves every anchor into a copy of the base, so that training and serving no longer pay for it.

    Args:
      params: the base. Untouched: the result shares every weight that has no anchor.
      quantize, block: as in `lowrank_jax.quantize`: the folded base is quantised, each weight (of a stack, each layer) after its anchor
        has left it and before the next is read. What is rounded is a residual, smaller than the weight; the anchor's directions stay exact.

    Returns:
      ``(folded_params, folded_adapters)``, which together act like the arguments, to rounding. Methods without an anchor
      are left as they are. The folded adapter only fits the folded base.

    Raises:
      ValueError: already folded, a weight that would not be finite, or what `lowrank_jax.quantize` refuses.
      UnsupportedError: an anchor in a weight that is quantised already.
    """
    if adapters.folded:
        raise ValueError("fold: these adapters are folded already.")
    flat = flatten(params)
    kinds = {} if quantize is None else chosen(flat, quantize, block)
    new: dict[str, Any] = {}
    for entry, anchor in _anchors(flat, adapters):
        path, weight = entry.site.path, flat[entry.site.path]
        if path not in kinds:
            new[path] = _shifted(entry.site, weight, anchor, -1)
        elif entry.site.batch[:1] == (0,):
            residuals = (
                _shifted(entry.site.layer, layer, jax.tree.map(lambda x, n=n: x[n], anchor), -1)
                for n, layer in enumerate(layers(weight))
            )
            new[path] = quantized_layers(weight, residuals, kinds[path], block)
        else:
            new[path] = quantized(_shifted(entry.site, weight, anchor, -1), kinds[path], block)
    new |= {path: quantized(flat[path], kind, block) for path, kind in kinds.items() if path not in new}
    return read(with_leaves(params, new)), adapters.replace(folded=True)


def unfold(params: Any, adapters: Adapters) -> tuple[Any, Adapters]:
    """Inverse of `fold`, to rounding in the base's dtype. Keep the original base where bits matter; folding leaves it alone.

    Raises:
      ValueError: not folded. UnsupportedError: an anchor to be put into a quantised weight.
    """
    if not adapters.folded:
        raise ValueError("unfold: these adapters are not folded.")
    flat = flatten(params)
    new = {
        entry.site.path: _shifted(entry.site, flat[entry.site.path], anchor, 1)
        for entry, anchor in _anchors(flat, adapters)
    }
    return with_leaves(params, new), adapters.replace(folded=False)


def _anchors(flat: Mapping[str, Any], adapters: Adapters) -> Iterator[tuple[Entry, Form]]:
    """The sites whose method has an anchor, with it."""
    if adapters.stacked is not None:
        raise UnsupportedError("A stack of adapters cannot be folded: its rows share one base.")
    check_params(flat, adapters.plan)
    for entry in adapters.plan.entries:
        if entry.method.anchor is not None:
            _refuse_quantized(entry.site.path, flat[entry.site.path], "folded, or unfolded")
            yield entry, spread(entry, entry.method.anchor(entry.local, adapters.sites[entry.site.path]))


def _shifted(site: Site, weight: Any, anchor: Form, sign: int) -> jax.Array:
    """A weight with an anchor put in (sign 1) or taken out (-1), rounded once."""
    matrix = site.canonical(weight).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        shifted = site.original(matrix + sign * anchor.delta(matrix)).astype(weight.dtype)
    _refuse_nonfinite({site.path: shifted})
    return shifted


def _refuse_quantized(path: str, weight: Any, what: str) -> None:
    if is_quantized(weight):
        raise UnsupportedError(
            f"{path} is quantised and cannot be {what}: it would be rounded a second time. Start from the dense weights: "
            "lowrank_jax.fold(dense, adapters, quantize={...}) quantises what is left of each."
        )


def _refuse_nonfinite(new: dict[str, Any]) -> None:
    for path, weight in new.items():
        if isinstance(weight, jax.core.Tracer) or not jnp.issubdtype(weight.dtype, jnp.floating):
            continue
        if not bool(jnp.isfinite(weight).all()):
            raise ValueError(
                f"{path}: the merged weight is not finite. The adapter or the base holds NaN or inf there; nothing was merged."
            )
