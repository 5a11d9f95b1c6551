"""Tiny models for the conformance suite: the same weights through both bridges, every site kind and every layout.

All models of one kind compute the same function of the same numbers, so their outputs and gradients must agree whatever the
bridge and the layout. Weights and adapters are written for the plain Linen model (the *canonical* paths); `Model.lay`
renames and stacks them for the others.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import lowrank_jax as lr
import lowrank_jax.nnx
from lowrank_jax import shard
from lowrank_jax.sites import flatten, with_leaves

BRIDGES = ("linen", "nnx")
KINDS = ("dense", "general", "conv", "embed", "tied")
LAYOUTS = ("plain", "scanned", "remat", "bf16", "mesh")
STACKED = ("scanned", "remat", "mesh")
VOCAB, WIDTH, LAYERS = 12, 8, 2

IDS = jax.random.randint(jax.random.key(5), (4, 5), 0, VOCAB)
X = jax.random.normal(jax.random.key(6), (4, 5, WIDTH))
SPECS = {
    "embed/embedding": ("tensor", "fsdp"),
    "layers/split/kernel": (None, "fsdp", "tensor", None),
    "layers/join/kernel": (None, "tensor", None, "fsdp"),
    "conv/kernel": (None, "fsdp", "tensor"),
}


class Model(NamedTuple):
    """A model seen through one bridge.

    Attributes:
      run: ``(params, *args)``, the plain model; apply: ``(params, adapters, *args, rows=None)``, with an adapter.
      lay: ``{canonical path: tree}`` to ``{path of this model: tree}``; a stack of layers has its leaves stacked, padded with zeros
        where layers differ in rank.
    """

    params: Any
    sites: dict[str, lr.Site]
    args: tuple[jax.Array, ...]
    run: Callable[..., jax.Array]
    apply: Callable[..., jax.Array]
    lay: Callable[[Mapping[str, Any]], dict[str, Any]]


class LinenBlock(nn.Module):
    dtypes: Any

    @nn.compact
    def __call__(self, x, _=None):
        h = jnp.tanh(nn.DenseGeneral((2, 4), name="split", **self.dtypes)(x))
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join", **self.dtypes)(h), None


class LinenModel(nn.Module):
    kind: str
    layout: str

    @nn.compact
    def __call__(self, x):
        dtypes = _dtypes(self.layout)
        if self.kind == "dense":
            return nn.Dense(10, name="site", **dtypes)(x)
        if self.kind == "conv":
            return nn.Conv(10, (3,), name="site", **dtypes)(x)
        if self.kind == "general":
            h = jnp.tanh(nn.DenseGeneral((2, 5), name="split", **dtypes)(x))
            return nn.Einsum((2, 5, 7), "btnh,nho->bto", use_bias=False, name="join", **dtypes)(h)
        embed = nn.Embed(VOCAB, WIDTH, name="embed", **dtypes)
        x = embed(x)
        if self.kind == "embed":
            return x
        if self.kind == "tied":
            return embed.attend(jnp.tanh(x))
        block = nn.remat(LinenBlock) if self.layout in ("remat", "mesh") else LinenBlock
        if self.layout in STACKED:
            scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = scan(dtypes, name="layers")(x, None)
        else:
            for n in range(LAYERS):
                x, _ = block(dtypes, name=f"layers_{n}")(x)
        return embed.attend(nn.Conv(WIDTH, (3,), name="conv", **dtypes)(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs, dtypes):
        self.split = nnx.LinearGeneral(WIDTH, (2, 4), rngs=rngs, **dtypes)
        self.join = nnx.LinearGeneral((2, 4), WIDTH, axis=(-2, -1), rngs=rngs, **dtypes)

    def __call__(self, x):
        return x + self.join(jnp.tanh(self.split(x)))


class NnxModel(nnx.Module):
    def __init__(self, kind, layout, rngs):
        self.kind, self.layout, dtypes = kind, layout, _dtypes(layout)
        if kind == "dense":
            self.site = nnx.Linear(WIDTH, 10, rngs=rngs, **dtypes)
        elif kind == "conv":
            self.site = nnx.Conv(WIDTH, 10, (3,), rngs=rngs, **dtypes)
        elif kind == "general":
            self.split = nnx.LinearGeneral(WIDTH, (2, 5), rngs=rngs, **dtypes)
            self.join = nnx.Einsum("btnh,nho->bto", (2, 5, 7), rngs=rngs, **dtypes)
        else:
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs, **dtypes)
        if kind == "mixed":
            self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs, **dtypes)
            make = lambda r: NnxBlock(r, dtypes)  # noqa: E731
            if layout in STACKED:
                self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(make, in_axes=(0,), out_axes=0))(rngs)
            else:
                self.layers = nnx.List([make(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        if self.kind in ("dense", "conv"):
            return self.site(x)
        if self.kind == "general":
            return self.join(jnp.tanh(self.split(x)))
        x = self.embed(x)
        if self.kind == "embed":
            return x
        if self.kind == "tied":
            return self.embed.attend(jnp.tanh(x))
        step = lambda layer, x: layer(x)  # noqa: E731
        if self.layout in ("remat", "mesh"):
            step = nnx.remat(step)
        if self.layout in STACKED:
            x = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        else:
            for layer in self.layers:
                x = step(layer, x)
        return self.embed.attend(self.conv(x))


def _dtypes(layout: str) -> dict[str, Any]:
    """bf16 is a storage type here: the model computes in float32, so that nothing but the stored numbers is rounded."""
    return {"param_dtype": jnp.bfloat16 if layout == "bf16" else jnp.float32, "dtype": jnp.float32}


@functools.cache
def canonical_params(kind: str) -> dict[str, jax.Array]:
    """The weights every model of a kind has, by canonical path; biases are not zero."""
    x = IDS if kind in ("embed", "tied", "mixed") else X
    shapes = flatten(jax.eval_shape(LinenModel(kind, "plain").init, jax.random.key(0), x)["params"])
    random = np.random.default_rng(0)
    scale = lambda shape: 1 / math.sqrt(math.prod(shape[:-1])) if len(shape) > 1 else 0.1  # noqa: E731
    return {p: jnp.asarray(scale(s.shape) * random.standard_normal(s.shape), jnp.float32) for p, s in shapes.items()}


def mesh_of(devices: tuple[int, int, int]) -> jax.sharding.Mesh:
    """So many devices along data, fsdp and tensor."""
    return shard.mesh(dict(zip(("data", "fsdp", "tensor"), devices, strict=True)))


@functools.cache
def build(bridge: str, kind: str, layout: str = "plain", devices: tuple[int, int, int] = (2, 2, 2)) -> Model:
    """The model of a kind in a layout through a bridge, with the canonical weights; ``devices``: along the axes of the mesh."""
    args = (IDS if kind in ("embed", "tied", "mixed") else X,)
    lay = functools.partial(_lay, bridge=bridge, stacked=layout in STACKED)
    flat = lay(canonical_params(kind))
    if layout == "bf16":
        flat = {path: leaf.astype(jnp.bfloat16) for path, leaf in flat.items()}
    if layout == "mesh":
        mesh = mesh_of(devices)
        lay_out = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, shard.fitted(leaf.shape, spec, mesh)))  # noqa: E731
        flat = {p: lay_out(leaf, SPECS.get(p, (None,) * leaf.ndim)) for p, leaf in flat.items()}
        args = tuple(lay_out(x, ("data", *(None,) * (x.ndim - 1))) for x in args)
    if bridge == "linen":
        return _linen(LinenModel(kind, layout), flat, args, lay)
    return _nnx(NnxModel(kind, layout, nnx.Rngs(0)), flat, args, lay)


def _linen(model: nn.Module, flat: Mapping[str, Any], args: tuple, lay: Any) -> Model:
    params = with_leaves(jax.eval_shape(model.init, jax.random.key(0), *args)["params"], flat)
    run = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
    return Model(params, lr.linen.sites(model, params, *args), args, run, functools.partial(lr.linen.apply, model), lay)


def _nnx(model: nnx.Module, flat: Mapping[str, Any], args: tuple, lay: Any) -> Model:
    params = with_leaves(lowrank_jax.nnx.params(model), flat)
    nnx.update(model, params)

    @jax.jit
    def run(params: Any, *args: Any) -> Any:
        copy = nnx.clone(model)
        nnx.update(copy, params)
        return copy(*args)

    return Model(params, lowrank_jax.nnx.sites(model), args, run, functools.partial(lowrank_jax.nnx.apply, model), lay)


def _lay(trees: Mapping[str, Any], bridge: str, stacked: bool) -> dict[str, Any]:
    if not stacked:
        return {re.sub(r"^layers_", "layers/", p) if bridge == "nnx" else p: tree for p, tree in trees.items()}
    groups: dict[str, list[Any]] = {}
    for path in sorted(trees):
        groups.setdefault(re.sub(r"^layers_\d+", "layers", path), []).append(trees[path])
    return {
        path: jax.tree.map(_stack, *group) if path.startswith("layers") else group[0] for path, group in groups.items()
    }


def _stack(*leaves: Any) -> jax.Array:
    shape = tuple(map(max, *(leaf.shape for leaf in leaves)))
    return jnp.stack([np.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape, strict=True)]) for leaf in leaves])
