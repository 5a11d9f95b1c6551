"""The Linen bridge: adapters on any `flax.linen` model, through method interception.

The factors are laid into 'params' beside their weight, so that nn.scan slices and nn.remat recomputes them along with it, and the
modules are intercepted where they are called. The model and its parameters stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_jax.adapters import Adapters
from lowrank_jax.bridge import adapt_matmul, conv_call, embed_call, routes, run
from lowrank_jax.forms import Form, UnsupportedError
from lowrank_jax.layout import Labels, dense_equation
from lowrank_jax.sites import Site, describe, flatten
from lowrank_jax.sites import sites as sites_from_params

Equation = Callable[..., str]


@dataclass(frozen=True)
class _Matmul:
    weight: str
    equation: Equation
    methods: tuple[str, ...] = ("__call__",)


def _general(module: nn.DenseGeneral, x: Any) -> str:
    as_tuple = lambda v: (v,) if isinstance(v, int) else tuple(v)  # noqa: E731
    axis = [a % x.ndim for a in as_tuple(module.axis)]
    return dense_equation(axis, [a % x.ndim for a in as_tuple(module.batch_dims)], len(as_tuple(module.features)), x.ndim)


_MATMULS: dict[type, _Matmul] = {
    nn.Dense: _Matmul("kernel", lambda module, x: "...i,io->...o"),
    nn.DenseGeneral: _Matmul("kernel", _general),
    nn.Einsum: _Matmul("kernel", lambda module, x, einsum_str=None: einsum_str or module.einsum_str),
}


def register(cls: type, weight: str, equation: Equation, methods: Sequence[str] = ("__call__",)) -> None:
    """Teaches the bridge a matmul module of your own.

    Args:
      cls: the module class (subclasses included). weight: the name of its parameter.
      equation: ``(module, x, *other call arguments) ->`` the einsum of the call, input first, weight second.
      methods: the methods that multiply by the weight; their first argument is the input.

    Example:
      >>> class Projection(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x @ self.param("w", nn.initializers.ones, (x.shape[-1], 2))
      >>> register(Projection, weight="w", equation=lambda module, x: "...i,io->...o")
    """
    _MATMULS[cls] = _Matmul(weight, equation, tuple(methods))


def sites(model: nn.Module, params: Any, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """The sites of a model, from one abstract trace of ``model.apply({'params': params}, *args, **kwargs)``.

    Nothing is computed; arrays may be ShapeDtypeStructs. Weights of modules that the call does not reach are recognised from the
    parameters alone, like `lowrank_jax.sites` does.

    Raises:
      ValueError: one weight used by two calls whose axes play different roles.

    Example:
      >>> model = nn.DenseGeneral((2, 3))
      >>> x = jnp.ones((1, 4))
      >>> found = sites(model, model.init(jax.random.key(0), x)["params"], x)
      >>> found["kernel"].n_in, found["kernel"].n_out
      (4, 6)
    """
    params = meta.unbox(params)
    flat = flatten(params)
    found = sites_from_params(params)
    seen: dict[str, Site] = {}

    def record(module: nn.Module, weight: str, make: Callable[[str, Any, tuple[int, ...]], Site]) -> None:
        path = "/".join((*module.path, weight))
        local = module.get_variable("params", weight)
        if path not in flat or local is None:
            return
        site = make(path, flat[path], tuple(meta.unbox(local).shape))
        if path in seen and seen[path] != site:
            raise ValueError(f"{path} is used by two calls that read its axes differently; it cannot carry one adapter.")
        seen[path] = site

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = next_fun(*args, **kwargs)
        module, name = context.module, context.method_name
        if isinstance(module, nn.Embed) and name in ("__call__", "attend"):
            record(module, "embedding", _embed_site)
        elif isinstance(module, nn.Conv) and name == "__call__":
            record(module, "kernel", _conv_site if _plain_conv(module) else _param_site)
        elif (matmul := _matmul_of(module, name)) is not None:
            labels = Labels.parse(matmul.equation(module, *args, **kwargs), args[0].ndim)
            record(module, matmul.weight, lambda p, leaf, local: _matmul_site(p, leaf, local, labels))
        return y

    static = {k: v for k, v in kwargs.items() if not _is_array(v)}
    arrays = {k: v for k, v in kwargs.items() if _is_array(v)}
    fixed = [a if not _is_array(a) else None for a in args]

    def call(params: Any, moving: list[Any], named: dict[str, Any]) -> Any:
        positional = [m if f is None else f for m, f in zip(moving, fixed, strict=True)]
        return model.apply({"params": params}, *positional, **named, **static)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(call, params, [a if f is None else None for a, f in zip(args, fixed, strict=True)], arrays)
    return {path: seen.get(path, site) for path, site in found.items()}


def adapted(model: nn.Module, adapters: Adapters, rows: jax.Array | None = None, unused: str = "error") -> Callable[..., Any]:
    """``model.apply`` with an adapter: a function of the same signature.

    Args:
      rows: ``[batch]`` int32, the adapter of each row of the batch in a stack of adapters; -1 asks for the base.
      unused: ``error`` or ``ignore`` adapters whose weight the call does not use.

    Raises (when called):
      ValueError: parameters of another model; an adapted weight that was not used, or not by a registered module.

    Example:
      >>> import lowrank_jax as lr
      >>> model, x = nn.Dense(2), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = lr.plan(variables["params"], {"kernel": lr.lora(rank=1)})
      >>> adapters = lr.init(jax.random.key(1), variables["params"], plan)
      >>> bool((adapted(model, adapters)(variables, x) == model.apply(variables, x)).all())
      True
    """
    if (rows is None) != (adapters.stacked is None):
        raise ValueError(
            "rows and a stack of adapters go together: pass rows=[...] with lowrank_jax.stack([...]), or neither of them."
        )

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        params = meta.unbox(variables["params"])
        flat = flatten(params)
        forms, weights = routes(flat, adapters)
        laid, layout = _lay(params, forms, weights, adapters)
        used: set[str] = set()
        with _intercept(layout, rows, used):
            out = model.apply({**variables, "params": laid}, *args, **kwargs)
        missed = [path for path in layout if path not in used]
        if missed and unused == "error":
            raise ValueError(
                f"The adapter of {missed[0]} was not applied: this call does not use the weight, or not through a registered module "
                f"({len(missed)} of {len(layout)} sites). Exclude it from the plan, register its module, or pass unused='ignore'."
            )
        return out

    return apply


def apply(model: nn.Module, params: Any, adapters: Adapters, *args: Any, rows: jax.Array | None = None, unused: str = "error",
          **kwargs: Any) -> Any:  # fmt: skip
    """``model.apply({'params': params}, *args, **kwargs)`` with an adapter; see `adapted`."""
    return adapted(model, adapters, rows, unused)({"params": params}, *args, **kwargs)


def _lay(params: Any, forms: Mapping[str, Form], weights: Mapping[str, Any], adapters: Adapters) -> tuple[Any, dict[str, Any]]:
    """A copy of ``params`` with factors beside their weights; arrays are shared, only the dicts are new."""
    laid = _copy_dicts(params)
    layout = {}
    for path, weight in weights.items():
        _holder(laid, path)[path.rpartition("/")[2]] = weight
    for path, form in forms.items():
        site = adapters.plan.by_path[path].site
        leaves, layout[path] = jax.tree.flatten(form)
        for n, leaf in enumerate(leaves):
            if adapters.stacked is not None:
                leaf = jnp.moveaxis(leaf, 0, len(site.batch))
            for position, axis in enumerate(site.scanned):
                leaf = jnp.moveaxis(leaf, position, axis)
            _holder(laid, path)[_name(path.rpartition("/")[2], n)] = leaf
    return laid, layout


def _name(weight: str, n: int) -> str:
    return f"{weight}:{n}"


def _copy_dicts(tree: Any) -> Any:
    return {k: _copy_dicts(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _holder(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for key in path.split("/")[:-1]:
        tree = tree[key]
    return tree


@contextlib.contextmanager
def _intercept(layout: Mapping[str, Any], rows: jax.Array | None, used: set[str]) -> Iterator[None]:
    busy = [False]  # a convolution runs a clone of its module, which must not be intercepted again

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, name = context.module, context.method_name
        weight = None if busy[0] else _weight_of(module, name)
        path = "" if weight is None else "/".join((*module.path, weight))
        if weight is None or path not in layout:
            return next_fun(*args, **kwargs)
        y = next_fun(*args, **kwargs)
        used.add(path)
        treedef = layout[path]
        leaves = [module.get_variable("params", _name(weight, n)) for n in range(treedef.num_leaves)]
        form = treedef.unflatten(leaves)
        kernel = meta.unbox(module.get_variable("params", weight))
        drops = bool(getattr(form, "dropout", 0)) and module.has_rng("dropout")
        rng = module.make_rng("dropout") if drops else None
        if isinstance(module, nn.Embed):
            if name == "attend":
                labels = Labels.parse("...d,vd->...v", args[0].ndim)
                return adapt_matmul(form.transpose(), labels, args[0], y, kernel, rng, rows)
            return run(form, embed_call(args[0], y, kernel), rows)
        if isinstance(module, nn.Conv):
            if not _plain_conv(module):
                raise UnsupportedError(f"{path}: grouped and masked convolutions cannot carry this adapter; exclude it.")

            def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
                busy[0] = True
                try:
                    clone = module.clone(features=w.shape[-1], use_bias=False, parent=None, name=None)
                    return clone.apply({"params": {"kernel": w}}, x)
                finally:
                    busy[0] = False

            return run(form, conv_call(args[0], y, kernel, convolve, rng), rows)
        matmul = _matmul_of(module, name)
        assert matmul is not None
        labels = Labels.parse(matmul.equation(module, *args, **kwargs), args[0].ndim)
        return adapt_matmul(form, labels, args[0], y, kernel, rng, rows)

    with nn.intercept_methods(interceptor):
        yield


def _matmul_of(module: nn.Module, method: str | None) -> _Matmul | None:
    for cls in type(module).__mro__:
        if cls in _MATMULS:
            return _MATMULS[cls] if method in _MATMULS[cls].methods else None
    return None


def _weight_of(module: nn.Module, method: str | None) -> str | None:
    if isinstance(module, nn.Embed):
        return "embedding" if method in ("__call__", "attend") else None
    if isinstance(module, nn.Conv):
        return "kernel" if method == "__call__" else None
    matmul = _matmul_of(module, method)
    return None if matmul is None else matmul.weight


def _plain_conv(module: nn.Conv) -> bool:
    return module.feature_group_count == 1 and module.mask is None


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def stack_axes(full: tuple[int, ...], local: tuple[int, ...]) -> tuple[int, ...]:
    """The axes a transform removed from a stacked weight; leading ones where several readings fit."""
    for axes in itertools.combinations(range(len(full)), len(full) - len(local)):
        if tuple(n for a, n in enumerate(full) if a not in axes) == local:
            return axes
    raise ValueError(f"A weight of shape {full} is seen by its module as {local}; that is no slice of it.")


def _matmul_site(path: str, leaf: Any, local: tuple[int, ...], labels: Labels) -> Site:
    stacked = stack_axes(tuple(leaf.shape), local)
    kept = [a for a in range(len(leaf.shape)) if a not in stacked]
    role = lambda chars: [kept[labels.w.index(c)] for c in chars]  # noqa: E731
    return describe(path, leaf, "dense", batch=[*stacked, *role(labels.batch)], inputs=role(labels.inputs),
                    outputs=role(labels.outputs), scanned=stacked)  # fmt: skip


def _conv_site(path: str, leaf: Any, local: tuple[int, ...]) -> Site:
    stacked = stack_axes(tuple(leaf.shape), local)
    kept = [a for a in range(len(leaf.shape)) if a not in stacked]
    return describe(path, leaf, "conv", batch=stacked, inputs=kept[:-1], outputs=kept[-1:], scanned=stacked)


def _embed_site(path: str, leaf: Any, local: tuple[int, ...]) -> Site:
    stacked = stack_axes(tuple(leaf.shape), local)
    kept = [a for a in range(len(leaf.shape)) if a not in stacked]
    return describe(path, leaf, "embed", batch=stacked, inputs=kept[:1], outputs=kept[1:], scanned=stacked)


def _param_site(path: str, leaf: Any, local: tuple[int, ...]) -> Site:
    return describe(path, leaf, "param", factored=False)
