"""How one NNX module is adapted: which modules can be, their sites, and the subclasses that add a form to a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from lowrank_jax.bridge import Batch, adapt_matmul, conv_call, embed_call, run
from lowrank_jax.forms import Form, UnsupportedError
from lowrank_jax.layout import Labels, dense_equation
from lowrank_jax.quantized import dense, is_quantized
from lowrank_jax.site_kinds import Matmul, conv_site, embed_site, input_of, matmul_site, registered
from lowrank_jax.sites import Site


def _general(module: nnx.LinearGeneral, x: Any, out_sharding: Any = None) -> str:
    axis = [a % x.ndim for a in module.axis]
    return dense_equation(axis, [a % x.ndim for a in module.batch_axis], len(module.out_features), x.ndim)


def _einsum(module: nnx.Einsum, x: Any, einsum_str: str | None = None, out_sharding: Any = None) -> str:
    return einsum_str or module.einsum_str


MATMULS: dict[type, Matmul] = {
    nnx.Linear: Matmul("kernel", lambda module, x, out_sharding=None: "...i,io->...o"),
    nnx.LinearGeneral: Matmul("kernel", _general),
    nnx.Einsum: Matmul("kernel", _einsum),
}
_OTHERS: dict[Any, tuple[str, tuple[str, ...]]] = {
    nnx.Conv: ("kernel", ("__call__",)),
    nnx.Embed: ("embedding", ("__call__", "attend")),
}


@dataclass(eq=False)
class Run:
    """One `apply`: compared by identity, so that a transform inside the model never reuses a trace of another one."""

    batch: Batch = Batch()
    used: dict[str, int] = field(default_factory=dict)
    labels: list[tuple[str, tuple[int, ...], Labels]] | None = None


@dataclass(frozen=True)
class Installed:
    """What an adapted module knows: its weight, how its factors make a form (None: only record the call), and the run.

    ``extra`` axes of each factor over the weight's, which stays the same however a transform slices both.
    """

    path: str
    weight: str
    treedef: Any
    run: Run | None
    extra: tuple[int, ...] = ()


@dataclass(frozen=True)
class Target:
    """The class whose methods are adapted, among a module's bases."""

    base: Any
    methods: tuple[str, ...]
    matmul: Matmul | None

    def weight_of(self, module: Any) -> str:
        return _OTHERS[self.base][0] if self.matmul is None else self.matmul.weight_of(module)


def targets(model: nnx.Module) -> Iterator[tuple[str, Any, Target]]:
    """Every module with an adaptable weight, and that weight's path."""
    paths = {id(variable): path for path, variable in weights_of(model).items()}
    for place, module in nnx.iter_modules(model):
        match = registered(MATMULS, type(module))
        other = next((cls for cls in type(module).__mro__ if cls in _OTHERS), None)
        if match is not None:
            target = Target(match[0], match[1].methods, match[1])
        elif other is not None:
            target = Target(other, _OTHERS[other][1], None)
        else:
            continue
        if hasattr(module, "lowrank_site"):
            raise ValueError(
                f"{'/'.join(map(str, place))} already carries an adapter; adapt the model that was passed to lowrank_jax.nnx.attach."
            )
        path = paths.get(id(getattr(module, target.weight_of(module), None)))
        if path is not None:
            yield path, module, target


def weights_of(model: nnx.Module) -> dict[str, Any]:
    """The nnx.Param variables of a model by path; one used at several places once."""
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}


class _InputNeededError(Exception):
    """An equation asked for its call's input."""


class _NoInput:
    def __getattr__(self, name: str) -> Any:
        raise _InputNeededError


def site_of(path: str, leaf: Any, module: Any, target: Target) -> Site | None:
    """The site of one module's weight, or None where only a call tells."""
    if target.base is nnx.Embed:
        return embed_site(path, leaf, (module.num_embeddings, module.features))
    if target.base is nnx.Conv:
        return conv_site(path, leaf, tuple(module.kernel_shape)) if _plain(module) else None
    assert target.matmul is not None
    if target.base is nnx.LinearGeneral:
        sizes = (*module.batch_axis.values(), *module.in_features, *module.out_features)
        n_batch, n_in = len(module.batch_axis), len(module.in_features)
        x = "abcdefghijklmnopqrstuvwxyz"[: len(sizes)]
        batch, inputs, outputs = x[:n_batch], x[n_batch : n_batch + n_in], x[n_batch + n_in :]
        return matmul_site(path, leaf, sizes, Labels(batch + inputs, x, batch + outputs))
    equation = target.matmul.equation
    try:
        inspect.signature(equation).bind(module, _NoInput())
    except TypeError:  # it takes arguments of the call
        return None
    try:
        text = equation(module, _NoInput())
    except _InputNeededError:
        return None
    if text is None:
        return None
    x = text.replace(" ", "").partition(",")[0]
    labels = Labels.parse(text, len(x.replace("...", "")))
    if target.base is nnx.Linear:
        local: tuple[int, ...] = (module.in_features, module.out_features)
    elif target.base is nnx.Einsum:
        local = tuple(module.kernel_shape)
    else:
        local = tuple(leaf.shape)[len(leaf.shape) - len(labels.w) :]
    return matmul_site(path, leaf, local, labels)


def _plain(module: nnx.Conv) -> bool:
    return module.feature_group_count == 1 and module.mask is None


def install(module: Any, target: Target, installed: Installed) -> None:
    """Makes a module an adapted one, in place."""
    cls: Any = type(module)
    object.__setattr__(module, "__class__", _adapted_class(cls, target))
    module.lowrank_site = installed


@functools.cache
def _adapted_class(cls: Any, target: Target) -> type:
    """``cls`` with the methods of the target's base replaced where ``super()`` of its subclasses finds them."""
    if cls is not target.base:
        return type(cls)(
            f"Adapted{cls.__name__}", (cls, _adapted_class(target.base, target)), {"__module__": cls.__module__}
        )
    methods = {name: _adapted_method(getattr(cls, name), name, target) for name in target.methods}
    return type(cls)(f"Adapted{cls.__name__}", (cls,), {"__module__": cls.__module__, **methods})


def _adapted_method(original: Callable[..., Any], name: str, target: Target) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        installed: Installed = self.lowrank_site
        weight = getattr(self, installed.weight).get_value()
        if is_quantized(weight):
            y = _frugal(self, original, installed.weight, weight, args, kwargs)
        else:
            y = original(self, *args, **kwargs)
        if installed.treedef is None:
            if target.matmul is not None and installed.run is not None and installed.run.labels is not None:
                installed.run.labels.append((installed.path, weight.shape, target.matmul.labels(self, args, kwargs)))
            return y
        return _adapt(self, original, name, target, installed, weight, args, kwargs, y)

    return call


def _frugal(module: Any, original: Callable[..., Any], name: str, weight: Any, args: Any, kwargs: Any) -> Any:
    """A call on a quantised weight, which the backward pass makes dense again instead of keeping it dense, whatever the model's remat."""

    def call(weight: Any, *args: Any) -> Any:
        bare = object.__new__(type(module))
        vars(bare).update({**vars(module), name: nnx.Param(weight.dense())})
        return original(bare, *args, **kwargs)

    return jax.checkpoint(call)(weight, *args)


def _adapt(module: Any, original: Callable[..., Any], name: str, target: Target, installed: Installed, weight: Any,
           args: tuple[Any, ...], kwargs: Mapping[str, Any], y: jax.Array) -> jax.Array:  # fmt: skip
    """The output ``y`` of one call with its adapter."""
    leaves = [getattr(module, f"{installed.weight}:{n}").get_value() for n in range(installed.treedef.num_leaves)]
    if tuple(leaf.ndim - weight.ndim for leaf in leaves) != installed.extra:
        raise ValueError(
            f"{installed.path}: a transform of the model slices the weight but not its factors. Where it selects variables by type, such "
            "as in nnx.StateAxes, give lowrank_jax.nnx.Factor the axes of nnx.Param; lowrank_jax.nnx.apply needs no such change."
        )
    form: Form = installed.treedef.unflatten(leaves)
    weight = dense(weight)
    batch, calls = Batch(), 0
    if installed.run is not None:
        batch, calls = installed.run.batch, installed.run.used.get(installed.path, 0)
        installed.run.used[installed.path] = calls + 1
    bias = getattr(module, "bias", None)
    bias = bias.get_value() if isinstance(bias, nnx.Variable) else None
    key: Any = getattr(module, f"{installed.weight}:rng", None)
    rng = None if key is None else jax.random.fold_in(key.get_value().reshape(()), calls)
    if target.matmul is not None:
        x = target.matmul.input_of(args)
        return adapt_matmul(form, target.matmul.labels(module, args, kwargs), x, y, weight, bias, rng, batch)
    x = input_of(args)
    if target.base is nnx.Embed and name == "attend":
        return adapt_matmul(form.transpose(), Labels.parse("...d,vd->...v", x.ndim), x, y, weight, None, rng, batch)
    if target.base is nnx.Embed:
        return run(form, embed_call(x, y, weight), batch)
    if not _plain(module):
        raise UnsupportedError(
            f"{installed.path}: grouped and masked convolutions cannot carry this adapter; exclude it."
        )

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        bare = object.__new__(nnx.Conv)
        vars(bare).update({**vars(module), "kernel": nnx.Param(kernel), "bias": None, "use_bias": False})
        return original(bare, x)

    return run(form, conv_call(x, y, weight, bias, convolve, rng), batch)
