"""The Linen bridge: adapters on any `flax.linen` model, through method interception.

The factors are laid into 'params' beside their weight, so that nn.scan slices and nn.remat recomputes them along with it, and the
modules are intercepted where they are called. The model and its parameters stay as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from lowrank_jax.adapters import Adapters
from lowrank_jax.bridge import (
    Batch,
    adapt_matmul,
    check_batch,
    check_used,
    conv_call,
    embed_call,
    laid_leaves,
    routes,
    run,
    step_key,
)
from lowrank_jax.forms import Form, UnsupportedError
from lowrank_jax.layout import Labels, dense_equation
from lowrank_jax.quantized import is_quantized, unbox
from lowrank_jax.site_kinds import (
    Equation,
    Matmul,
    agree,
    conv_site,
    embed_site,
    input_of,
    matmul_site,
    registered,
    trace,
)
from lowrank_jax.sites import Site, flatten
from lowrank_jax.sites import sites as sites_from_params


def _general(module: nn.DenseGeneral, x: Any) -> str:
    as_tuple = lambda v: (v,) if isinstance(v, int) else tuple(v)  # noqa: E731
    axis = [a % x.ndim for a in as_tuple(module.axis)]
    return dense_equation(
        axis, [a % x.ndim for a in as_tuple(module.batch_dims)], len(as_tuple(module.features)), x.ndim
    )


_MATMULS: dict[type, Matmul] = {
    nn.Dense: Matmul("kernel", lambda module, x: "...i,io->...o"),
    nn.DenseGeneral: Matmul("kernel", _general),
    nn.Einsum: Matmul("kernel", lambda module, x, einsum_str=None: einsum_str or module.einsum_str),
}
# nn.jit inside a model reuses a trace when the names and shapes of its variables are the same, and then no interceptor runs:
# every `adapted` and every `sites` lays its leaves under names of its own.
_tokens = itertools.count()
_OTHERS = {nn.Conv: ("kernel", ("__call__",)), nn.Embed: ("embedding", ("__call__", "attend"))}


def register(
    cls: type,
    weight: str | Callable[[Any], str],
    equation: Equation,
    methods: Sequence[str] = ("__call__",),
    argument: int = 0,
) -> None:
    """Teaches the bridge a matmul module of your own.

    Args:
      cls: the module class; a subclass that calls ``super().__call__`` is adapted there. weight: the name of its parameter, or
        ``module -> name``.
      equation: ``(module, x, *other call arguments) ->`` the einsum of the call, input first, weight second.
      methods: the methods that multiply by the weight. argument: which positional argument of theirs is the input.

    Example:
      >>> class Projection(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x @ self.param("w", nn.initializers.ones, (x.shape[-1], 2))
      >>> register(Projection, weight="w", equation=lambda module, x: "...i,io->...o")
    """
    _MATMULS[cls] = Matmul(weight, equation, tuple(methods), argument)


def sites(model: nn.Module, params: Any, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """The sites of a model, from one abstract trace of ``model.apply({'params': params}, *args, **kwargs)``.

    Nothing is computed; arrays may be ShapeDtypeStructs. Weights of modules that the call does not reach are recognised from the
    parameters alone, like `lowrank_jax.sites` does.

    Raises:
      ValueError: one weight used by two calls whose axes play different roles.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nn.DenseGeneral((2, 3))
      >>> x = jnp.ones((1, 4))
      >>> found = sites(model, model.init(jax.random.key(0), x)["params"], x)
      >>> found["kernel"].n_in, found["kernel"].n_out
      (4, 6)
    """
    params = unbox(params)
    flat = flatten(params)
    found = sites_from_params(params)
    seen: dict[str, Site] = {}

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = next_fun(*args, **kwargs)
        if (target := _target(context)) is None:
            return y
        path, weight, matmul = target
        local: Any = context.module.get_variable("params", weight)
        if path not in flat or local is None:
            return y
        leaf, shape = flat[path], tuple(meta.unbox(local).shape)
        if matmul is not None:
            agree(seen, matmul_site(path, leaf, shape, matmul.labels(context.module, args, kwargs)))
        elif isinstance(context.module, nn.Embed):
            agree(seen, embed_site(path, leaf, shape))
        elif _plain_conv(context.module):
            agree(seen, conv_site(path, leaf, shape))
        return y

    marked = _copy_dicts(params)
    token = next(_tokens)
    for path, leaf in flat.items():
        _holder(marked, path)[_name(path.rpartition("/")[2], "site", token)] = leaf
    with nn.intercept_methods(interceptor):
        trace(lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs), (marked, *args), kwargs)
    return {path: seen.get(path, site) for path, site in found.items()}


def adapted(
    model: nn.Module,
    adapters: Adapters,
    rows: jax.Array | None = None,
    unused: str = "error",
    signals: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``model.apply`` with an adapter: a function of the same signature.

    Args:
      rows: ``[batch]`` int32, the adapter of each row of the batch in a stack of adapters; -1 asks for the base.
      unused: ``error`` or ``ignore`` adapters whose weight no call of the function has used.
      signals: ``{name: [batch]}``, for methods that weigh each row of the batch by something (PETALface).

    With ``rngs={"dropout": key}`` the adapter is in training: its dropout is on, and methods that draw something in each step do.
    A model that compiles itself (nn.jit) is compiled once for each function made here; under an outer jax.jit that costs nothing.

    Raises (when called):
      ValueError: parameters of another model; an adapted weight that was not used, or not by a registered module.

    Example:
      >>> import jax.numpy as jnp, lowrank_jax as lr
      >>> model, x = nn.Dense(2), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = lr.plan(variables["params"], {"kernel": lr.lora(rank=1)})
      >>> adapters = lr.init(jax.random.key(1), variables["params"], plan)
      >>> bool((adapted(model, adapters)(variables, x) == model.apply(variables, x)).all())
      True
    """
    batch = check_batch(rows, signals, adapters)
    token = next(_tokens)
    used: set[str] = set()

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        params = unbox(variables["params"])
        flat = flatten(params)
        rngs = kwargs.get("rngs")
        key = rngs.get("dropout") if isinstance(rngs, Mapping) else rngs
        forms, weights = routes(flat, adapters, None if key is None else step_key(key))
        laid, layout = _lay(params, forms, weights, adapters, token)
        with _intercept(layout, batch, used, token):
            out = model.apply({**variables, "params": laid}, *args, **kwargs)
        check_used(layout, used, unused)
        return out

    return apply


def apply(model: nn.Module, params: Any, adapters: Adapters, *args: Any, rows: jax.Array | None = None, unused: str = "error",
          signals: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:  # fmt: skip
    """``model.apply({'params': params}, *args, **kwargs)`` with an adapter; see `adapted`."""
    return adapted(model, adapters, rows, unused, signals)({"params": params}, *args, **kwargs)


def _lay(
    params: Any, forms: Mapping[str, Form], weights: Mapping[str, Any], adapters: Adapters, token: int
) -> tuple[Any, dict[str, Any]]:
    """A copy of ``params`` with factors beside their weights; arrays are shared, only the dicts are new."""
    laid = _copy_dicts(params)
    layout = {}
    for path, weight in weights.items():
        _holder(laid, path)[path.rpartition("/")[2]] = weight
    for path, form in forms.items():
        site = adapters.plan.by_path[path].site
        leaves, layout[path] = laid_leaves(form, site, adapters.stacked is not None)
        for n, leaf in enumerate(leaves):
            _holder(laid, path)[_name(path.rpartition("/")[2], n, token)] = leaf
    return laid, layout


def _name(weight: str, what: int | str, token: int) -> str:
    return f"{weight}:{what}:{token}"


def _copy_dicts(tree: Any) -> Any:
    return {k: _copy_dicts(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _holder(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for key in path.split("/")[:-1]:
        tree = tree[key]
    return tree


@contextlib.contextmanager
def _intercept(layout: Mapping[str, Any], batch: Batch, used: set[str], token: int) -> Iterator[None]:
    busy = [False]  # a convolution runs a clone of its module, which must not be intercepted again

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        target = None if busy[0] else _target(context)
        if target is not None and is_quantized(context.module.get_variable("params", target[1])):
            y = _frugal(context, args, kwargs, busy)
        else:
            y = next_fun(*args, **kwargs)
        if target is None or target[0] not in layout:
            return y
        module, (path, weight, matmul) = context.module, target
        used.add(path)
        treedef = layout[path]
        leaves: list[Any] = [module.get_variable("params", _name(weight, n, token)) for n in range(treedef.num_leaves)]
        form = treedef.unflatten(leaves)
        kernel, bias = (meta.unbox(module.get_variable("params", name)) for name in (weight, "bias"))
        drops = bool(getattr(form, "dropout", 0)) and module.has_rng("dropout")
        rng = module.make_rng("dropout") if drops else None
        if matmul is not None:
            labels, x = matmul.labels(module, args, kwargs), matmul.input_of(args)
            return adapt_matmul(form, labels, x, y, kernel, bias, rng, batch)
        x = input_of(args)
        if isinstance(module, nn.Embed):
            if context.method_name == "attend":
                labels = Labels.parse("...d,vd->...v", x.ndim)
                return adapt_matmul(form.transpose(), labels, x, y, kernel, None, rng, batch)
            return run(form, embed_call(x, y, kernel), batch)
        if not _plain_conv(module):
            raise UnsupportedError(f"{path}: grouped and masked convolutions cannot carry this adapter; exclude it.")

        def convolve(x: jax.Array, w: jax.Array) -> Any:
            busy[0] = True
            try:
                clone = module.clone(features=w.shape[-1], use_bias=False, parent=None, name=None)
                return clone.apply({"params": {"kernel": w}}, x)
            finally:
                busy[0] = False

        return run(form, conv_call(x, y, kernel, bias, convolve, rng), batch)

    with nn.intercept_methods(interceptor):
        yield


def _frugal(context: nn.module.InterceptorContext, args: Any, kwargs: Any, busy: list[bool]) -> Any:
    """A call on a quantised weight, which the backward pass makes dense again instead of keeping it dense, whatever the model's remat."""
    method: Any = context.orig_method

    def call(module: nn.Module, *args: Any) -> Any:
        busy[0] = True
        try:
            return getattr(_owner(type(module), method.func), context.method_name)(module, *args, **kwargs)
        finally:
            busy[0] = False

    return nn.remat(call)(context.module, *args)


def _owner(cls: type, function: Any) -> type:
    """The class whose own method a function is; ``super()`` may have called it."""
    name, plain = function.__name__, inspect.unwrap(function)
    return next(base for base in cls.__mro__ if name in vars(base) and inspect.unwrap(vars(base)[name]) is plain)


def _target(context: nn.module.InterceptorContext) -> tuple[str, str, Matmul | None] | None:
    """The weight's path, its name and how it multiplies, where this call is one to adapt.

    A subclass that calls ``super()`` is intercepted at both levels; only the registered class' own method multiplies.
    """
    module, method = context.module, context.method_name
    match = registered(_MATMULS, type(module))
    if match is not None:
        base, matmul = match
        methods, weight = matmul.methods, matmul.weight_of(module)
    elif (other := next((cls for cls in type(module).__mro__ if cls in _OTHERS), None)) is not None:
        base, matmul = other, None
        weight, methods = _OTHERS[other]
    else:
        return None
    called: Any = context.orig_method  # a partial of the class' own function
    if method not in methods or inspect.unwrap(getattr(base, method)) is not inspect.unwrap(called.func):
        return None
    return "/".join((*module.path, weight)), weight, matmul


def _plain_conv(module: Any) -> bool:
    return module.feature_group_count == 1 and module.mask is None
