"""The NNX bridge: adapters on any `flax.nnx` model, through the classes of its modules.

On a structural copy of the model every adapted module becomes an instance of a subclass whose call adds the form; the factors
are laid beside the weight, so that nnx.scan, nnx.vmap and nnx.remat treat them as they treat it. Paths stay; the model that was
passed in is untouched.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax.adapters import Adapters
from lowrank_jax.bridge import check_batch, check_used, laid_leaves, routes, step_key
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.nnx_modules import MATMULS, Installed, Run, install, site_of, targets, weights_of
from lowrank_jax.site_kinds import Equation, Matmul, agree, matmul_site, trace
from lowrank_jax.sites import Site, flatten
from lowrank_jax.sites import sites as sites_from_params


class Factor(nnx.Variable):
    """One factor of an adapter in a model made by `attach`. Not an ``nnx.Param``: filters for the base's weights do not see it."""


def register(
    cls: type,
    weight: str | Callable[[Any], str],
    equation: Equation,
    methods: Sequence[str] = ("__call__",),
    argument: int = 0,
) -> None:
    """Teaches the bridge a matmul module of your own.

    Args:
      cls: the module class; a subclass that calls ``super().__call__`` is adapted there. weight: the name of its nnx.Param, or
        ``module -> name``.
      equation: ``(module, x, *other call arguments) ->`` the einsum of the call, input first, weight second.
      methods: the methods that multiply by the weight. argument: which positional argument of theirs is the input.

    Example:
      >>> class Projection(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.ones((3, 2)))
      ...     def __call__(self, x):
      ...         return x @ self.w[...]
      >>> register(Projection, weight="w", equation=lambda module, x: "...i,io->...o")
      >>> sites(Projection())["w"].n_in
      3
    """
    MATMULS[cls] = Matmul(weight, equation, tuple(methods), argument)


def params(model: nnx.Module) -> dict[Any, Any]:
    """The model's weights as nested plain dicts of arrays; a weight used at several places appears once.

    ``nnx.update(model, params)`` is its inverse: it writes (merged, folded) weights into a model.

    Example:
      >>> jax.tree.map(jnp.shape, params(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
      {'bias': (2,), 'kernel': (3, 2)}
    """
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def sites(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """The sites of a model, from its modules; nothing is computed and the model may be abstract (``nnx.eval_shape``).

    Weights stacked by nnx.vmap are recognised: their module knows its own shape. With arguments one abstract trace of
    ``model(*args, **kwargs)`` also reads equations that only a call tells (an ``nnx.Einsum`` without its own).

    Raises:
      ValueError: one weight used by two modules whose axes play different roles.

    Example:
      >>> found = sites(nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0)))
      >>> found["kernel"].n_in, found["kernel"].n_out
      (4, 6)
    """
    flat = flatten(params(model))
    found = sites_from_params(flat)
    seen: dict[str, Site] = {}
    for path, module, target in targets(model):
        if (site := site_of(path, flat[path], module, target)) is not None:
            agree(seen, site)
    if args or kwargs:
        record = Run(labels=[])

        def call(*args: Any, **kwargs: Any) -> None:
            copy = nnx.clone(model)
            for path, module, target in targets(copy):
                install(module, target, Installed(path, target.weight_of(module), None, record))
            copy(*args, **kwargs)

        trace(call, args, kwargs)
        for path, local, labels in record.labels or ():
            agree(seen, matmul_site(path, flat[path], local, labels))
    # What no registered module holds cannot be intercepted, whatever its name looks like.
    return {path: seen.get(path, replace(site, factored=False)) for path, site in found.items()}


def apply(
    model: nnx.Module,
    params: Any,
    adapters: Adapters,
    *args: Any,
    rows: jax.Array | None = None,
    method: str | Callable[..., Any] | None = None,
    rng: jax.Array | None = None,
    signals: Mapping[str, Any] | None = None,
    unused: str = "error",
    **kwargs: Any,
) -> Any:
    """``model(*args, **kwargs)`` with other weights and an adapter, as a pure function.

    Args:
      model: gives the structure and every state that is no nnx.Param; it is not changed, so what the call writes into its own
        state (batch statistics, caches) is lost: use `attach` to keep it. It may be abstract where ``params`` has everything.
      params: nested dict of weights, see `params`.
      rows: ``[batch]`` int32, the adapter of each row of the batch in a stack of adapters; -1 asks for the base.
      method: name of another method of the model, or a function of the model; None calls it.
      rng: key of the adapters' dropout and, in the model's place, of its own random streams; None: no dropout in the adapters, and
        methods that draw something in each training step do not.
      signals: ``{name: [batch]}``, for methods that weigh each row of the batch by something (PETALface).
      unused: ``error`` or ``ignore`` adapters whose weight the call does not use.

    Raises:
      ValueError: parameters of another model; an adapted weight that was not used, or not by a registered module.

    Example:
      >>> import lowrank_jax as lr
      >>> model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3))
      >>> plan = lr.plan(params(model), {"kernel": lr.lora(rank=1)}, sites=sites(model))
      >>> adapters = lr.init(jax.random.key(1), params(model), plan)
      >>> bool((apply(model, params(model), adapters, x) == model(x)).all())
      True
    """
    this = Run(check_batch(rows, signals, adapters))
    copy = nnx.clone(model)
    variables = weights_of(copy)
    for path, value in flatten(params).items():
        if path not in variables:
            raise ValueError(
                f"{path} is no weight of this {type(model).__name__}; pass the parameters of the model, see lowrank_jax.nnx.params."
            )
        variables[path].set_raw_value(value)
    if rng is not None:
        _reseed(copy, rng)
    laid = _lay(copy, variables, adapters, this, rng, None)
    call = (
        copy
        if method is None
        else getattr(copy, method)
        if isinstance(method, str)
        else functools.partial(method, copy)
    )
    out = call(*args, **kwargs)
    check_used(laid, this.used, unused)
    return out


def attach(model: nnx.Module, adapters: Adapters) -> nnx.Module:
    """A copy of the model that carries the adapter in it: for evaluation, generation and other code that calls ``model(...)``.

    The weights' arrays are shared and their paths stay; the factors are `Factor` variables beside them. Dropout of the adapter is
    off. What the adapter trains is decided by its own tree, so train with `apply`; a transform that selects variables by type
    (``nnx.StateAxes``) has to treat `Factor` like ``nnx.Param``.

    Raises:
      ValueError: an adapter of another model, or for a weight that no registered module holds.
      UnsupportedError: a stack of adapters, whose rows are an argument of each call.

    Example:
      >>> import lowrank_jax as lr
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> plan = lr.plan(params(model), {"kernel": lr.lora(rank=1)}, sites=sites(model))
      >>> adapted = attach(model, lr.init(jax.random.key(1), params(model), plan))
      >>> isinstance(adapted, nnx.Linear), sorted(nnx.to_pure_dict(nnx.state(adapted, Factor)))
      (True, ['kernel:0', 'kernel:1'])
    """
    if adapters.stacked is not None:
        raise UnsupportedError("attach takes one adapter; serve a stack with lowrank_jax.nnx.apply(..., rows=...).")
    copy = nnx.clone(model)
    _lay(copy, weights_of(copy), adapters, None, None, Factor)
    return copy


def _lay(model: nnx.Module, variables: Mapping[str, Any], adapters: Adapters, this: Run | None, rng: jax.Array | None,
         variable: Any) -> set[str]:  # fmt: skip
    """Lays weights and factors into a model and adapts its modules; gives the paths of the factored sites.

    ``variable``: the type of the factors' variables; None takes the weight's own, so that filters treat both alike.
    """
    key = None if rng is None else step_key(rng)
    forms, weights = routes({path: v.get_value() for path, v in variables.items()}, adapters, key)
    for path, weight in weights.items():
        variables[path].set_raw_value(weight)
    missing = dict(forms)
    for path, module, target in list(targets(model)):
        if path not in forms:
            continue
        missing.pop(path, None)
        name = target.weight_of(module)
        site = adapters.plan.by_path[path].site
        leaves, treedef = laid_leaves(forms[path], site, adapters.stacked is not None)
        make = type(variables[path]) if variable is None else variable
        for n, leaf in enumerate(leaves):
            setattr(module, f"{name}:{n}", make(leaf))
        if rng is not None and bool(getattr(forms[path], "dropout", 0)):
            setattr(module, f"{name}:rng", make(_keys(rng, site)))
        extra = tuple(leaf.ndim - len(site.shape) for leaf in leaves)
        install(module, target, Installed(path, name, treedef, this, extra))
    if missing:
        raise ValueError(
            f"{next(iter(missing))} is not the weight of a registered module of this model, so its adapter cannot be applied. "
            "Register its module (lowrank_jax.nnx.register) or exclude it from the plan."
        )
    return set(forms)


def _hash(path: str) -> int:
    return zlib.crc32(path.encode())


def _keys(rng: jax.Array, site: Site) -> jax.Array:
    """A key for each element of a site's stack, with axes where the weight's are sliced."""
    sizes = [1] * (max(site.scanned, default=-1) + 1)
    for axis in site.scanned:
        sizes[axis] = site.shape[axis]
    return jax.random.split(jax.random.fold_in(rng, _hash(site.path)), tuple(sizes))


def _reseed(model: nnx.Module, rng: jax.Array) -> None:
    """Puts the model's own random streams in the place that ``rng`` says."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.RngStream):
            key = jax.random.fold_in(rng, _hash("/".join(map(str, path))))
            shape = node.key.get_value().shape
            node.key.set_raw_value(jax.random.split(key, shape) if shape else key)
            node.count.set_raw_value(jnp.zeros(shape, jnp.uint32))
