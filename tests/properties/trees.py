"""Random trees of parameters, and plans over them."""

from __future__ import annotations

import re
from typing import Any

import jax
from hypothesis import strategies as st

import lowrank_jax as lr

_NAMES = st.sampled_from(("query", "value", "layers_0", "layers_1", "layers_10", "mlp", "a.b"))
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_SIZES = st.integers(1, 9)


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, "float32")


@st.composite
def _layers(draw: Any) -> dict[str, Any]:
    """A dense layer, with or without a bias, or a stack of them, which only its bias tells from another weight."""
    n_in, n_out = draw(_SIZES), draw(_SIZES)
    kind = draw(st.sampled_from(("bare", "biased", "stack")))
    if kind == "bare":
        return {"kernel": _shape(n_in, n_out)}
    stack = (draw(st.integers(1, 4)),) if kind == "stack" else ()
    return {"kernel": _shape(*stack, n_in, n_out), "bias": _shape(*stack, n_out)}


@st.composite
def params(draw: Any) -> dict[str, Any]:
    """A tree of one to six layers at random paths, as shapes."""
    tree: dict[str, Any] = {}
    for path, layer in draw(st.dictionaries(_PATHS, _layers(), min_size=1, max_size=6)).items():
        at = tree
        for name in path.split("/"):
            at = at.setdefault(name, {})
        at.update(layer)
    return tree


FACTORED = ("lora", "dora", "pissa", "lamda", "lora_xs", "svfit", "ia3")


def method(draw: Any, max_rank: int, names: tuple[str, ...] = (*FACTORED, "full")) -> lr.Method:
    """A method of a rank that fits."""
    name, rank = draw(st.sampled_from(names)), draw(st.integers(1, max_rank))
    return getattr(lr, name)(**({} if name in ("ia3", "full") else {"rank": rank}))


@st.composite
def plans(draw: Any) -> tuple[dict[str, Any], lr.Plan]:
    """Parameters, and a plan that names some of their kernels one by one."""
    tree = draw(params())
    kernels = {path: site for path, site in lr.sites(tree).items() if site.kind == "dense"}
    chosen = draw(st.lists(st.sampled_from(sorted(kernels)), min_size=1, unique=True))
    rules: dict[str, Any] = {}
    for path in chosen:
        rule = method(draw, kernels[path].max_rank)
        depth = kernels[path].batch_shape
        if depth and draw(st.booleans()):
            rule = lr.on_layers(rule, draw(st.lists(st.integers(0, depth[0] - 1), min_size=1, unique=True)))
        rules[re.escape(path)] = rule
    return tree, lr.plan(tree, rules)
