"""Sites: the places where a weight acts linearly, described without touching a device.

A site is what a plan selects and a method adapts. It is a few facts about one weight of the model: its path, its shape, and
which of its axes are *batch* (layers stacked by a scan, experts), *in* and *out*. Everything downstream sees the
weight canonically as ``[*batch, n_in, n_out]``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.quantized import dense, is_quantized, unbox

Kind = Literal["dense", "conv", "embed", "param"]


@dataclass(frozen=True)
class Site:
    """One adaptable weight.

    Attributes:
      path: '/'-joined path of the weight in the parameters, e.g. ``'encoder/layers/attention/query/kernel'``.
      kind: how it acts: ``dense`` (any matmul), ``conv``, ``embed`` (lookup, and attend), ``param`` (anything else: biases,
        norms; only dense forms apply).
      shape: shape of the weight; dtype: its storage dtype name.
      batch, inputs, outputs: the axes of the weight by role; together they are all its axes.
      scanned: the batch axes that a transform (nn.scan, nn.vmap) slices away before the module sees its weight; they come
        first in ``batch``.
      factored: whether a bridge can apply a form inside the model. False means the update has to be added to the weight.
      spec: the weight's PartitionSpec where it is known.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    batch: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    scanned: tuple[int, ...] = ()
    factored: bool = True
    spec: PartitionSpec | None = None

    @property
    def module(self) -> str:
        """Path of the module that holds the weight."""
        return self.path.rpartition("/")[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.batch)

    @property
    def n_in(self) -> int:
        return math.prod(self.shape[a] for a in self.inputs)

    @property
    def n_out(self) -> int:
        return math.prod(self.shape[a] for a in self.outputs)

    @property
    def max_rank(self) -> int:
        return min(self.n_in, self.n_out)

    @property
    def layer(self) -> Site:
        """The site of one element of the stack along the first batch axis."""
        gone = self.batch[0]
        rest = lambda axes: tuple(a - (a > gone) for a in axes if a != gone)  # noqa: E731
        return replace(
            self, shape=tuple(n for a, n in enumerate(self.shape) if a != gone), batch=rest(self.batch), inputs=rest(self.inputs),
            outputs=rest(self.outputs), scanned=rest(self.scanned), spec=None,
        )  # fmt: skip

    def canonical(self, weight: Any) -> jax.Array:
        """The weight as ``[*batch, n_in, n_out]``; a quantised one is made dense."""
        order, weight = self.batch + self.inputs + self.outputs, dense(weight)
        weight = weight if order == tuple(range(len(order))) else jnp.transpose(weight, order)
        return weight.reshape(*self.batch_shape, self.n_in, self.n_out)

    def original(self, matrix: jax.Array) -> jax.Array:
        """Inverse of `canonical`."""
        order = self.batch + self.inputs + self.outputs
        matrix = matrix.reshape([self.shape[a] for a in order])
        if order == tuple(range(len(order))):
            return matrix
        return jnp.transpose(matrix, [order.index(a) for a in range(len(order))])


def flatten(params: Any) -> dict[str, Any]:
    """A tree of parameters as ``{'a/b/kernel': array}``; accepts dicts, FrozenDicts, NNX states and boxed (nn.Partitioned) leaves.

    A `Quantized` weight is one leaf, which has the dense weight's shape and dtype.
    """
    if hasattr(params, "to_pure_dict"):
        params = params.to_pure_dict()
    leaves, _ = jax.tree_util.tree_flatten_with_path(unbox(params), is_leaf=is_quantized)
    return {"/".join(_key(k) for k in path): leaf for path, leaf in leaves}


def with_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """A copy of ``params`` with the leaves named in ``new`` replaced; everything else is shared, boxes stay."""
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)

    def replaced(path: Any, leaf: Any) -> Any:
        value = new.get("/".join(_key(k) for k in path), leaf)
        # A quantised weight is a box itself, and takes the place of the one that it lay in.
        return value if value is leaf or not is_box(leaf) or is_quantized(value) else leaf.replace_boxed(value)

    return jax.tree.unflatten(treedef, [replaced(path, leaf) for path, leaf in leaves])


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def describe(path: str, leaf: Any, kind: Kind, *, batch: Iterable[int] = (), inputs: Iterable[int] = (),
             outputs: Iterable[int] = (), scanned: Iterable[int] = (), factored: bool = True) -> Site:  # fmt: skip
    """A `Site` for one leaf (an array or anything with ``shape`` and ``dtype``)."""
    sharding = named_sharding(leaf)
    spec = None if sharding is None else sharding.spec
    return Site(path, kind, tuple(leaf.shape), jnp.dtype(leaf.dtype).name, tuple(batch), tuple(inputs), tuple(outputs),
                tuple(scanned), factored, spec)  # fmt: skip


def sites(params: Any, declare: Mapping[str, str] | None = None) -> dict[str, Site]:
    """Finds the sites of a model from its parameters alone.

    Unambiguous weights are recognised by name and rank: a two-axis ``kernel`` is a dense weight, a two-axis ``embedding`` a
    table, and a ``kernel`` with one more axis than two is a stack of dense weights when the ``bias`` beside it says so.
    Everything else is of kind ``param``; to see what it is run one abstract trace with ``lowrank_jax.linen.sites`` or
    ``lowrank_jax.nnx.sites``, or declare it.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      declare: ``{pattern: roles}`` for weights that cannot be recognised. ``roles`` has one letter an axis: ``b`` batch, ``i`` in,
        ``o`` out. A declared weight of an unknown module takes the dense route (its update is added to the weight).

    Returns:
      ``{path: Site}`` in the order of the tree.

    Raises:
      ValueError: a declaration that matches nothing or has the wrong number of letters.

    Example:
      >>> import jax.numpy as jnp
      >>> found = sites({"layer": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}})
      >>> [(s.path, s.kind, s.inputs, s.outputs) for s in found.values()]
      [('layer/bias', 'param', (), ()), ('layer/kernel', 'dense', (0,), (1,))]
    """
    flat = flatten(params)
    found = {path: _guess(path, leaf, flat) for path, leaf in flat.items()}
    for pattern, roles in (declare or {}).items():
        for path in hits(f"declare={{{pattern!r}: ...}}", pattern, found):
            if len(roles) != len(found[path].shape) or set(roles) - set("bio"):
                raise ValueError(
                    f"declare={{{pattern!r}: {roles!r}}}: {path} has shape {found[path].shape}; expected one letter an axis, "
                    "b (batch), i (in) or o (out), such as 'bio'."
                )
            axes = {c: tuple(n for n, r in enumerate(roles) if r == c) for c in "bio"}
            known = path.rpartition("/")[2] in ("kernel", "embedding")
            found[path] = replace(found[path], kind="dense", batch=axes["b"], inputs=axes["i"], outputs=axes["o"],
                                  scanned=axes["b"], factored=known)  # fmt: skip
    return found


def named_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of an array (or ShapeDtypeStruct) that lies on a mesh; None for tracers and single devices."""
    if isinstance(leaf, jax.core.Tracer):
        return None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def mesh_of(leaf: Any) -> Mesh | AbstractMesh | None:
    """The mesh that an array (or ShapeDtypeStruct) lies on; None for tracers and single devices."""
    sharding = named_sharding(leaf)
    return None if sharding is None else sharding.mesh


def _guess(path: str, leaf: Any, flat: Mapping[str, Any]) -> Site:
    module, _, name = path.rpartition("/")
    shape = tuple(leaf.shape)
    bias = flat.get(f"{module}/bias" if module else "bias")
    if name == "kernel" and len(shape) == 2 and not (bias is not None and len(bias.shape) == 2):
        return describe(path, leaf, "dense", inputs=(0,), outputs=(1,))
    if name == "kernel" and bias is not None and len(shape) == len(bias.shape) + 1 and len(shape) > 2:
        stacked = len(shape) - 2
        if tuple(bias.shape) == (*shape[:stacked], shape[-1]):
            return describe(path, leaf, "dense", batch=range(stacked), inputs=(stacked,),
                            outputs=(stacked + 1,), scanned=range(stacked))  # fmt: skip
    if name == "embedding" and len(shape) == 2:
        return describe(path, leaf, "embed", inputs=(0,), outputs=(1,))
    return describe(path, leaf, "param", factored=False)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a weight's path, or its module's, in full. ``.*/x`` also matches a root-level ``x``."""
    expression = _compile(pattern)
    module = path.rpartition("/")[0]
    return any(expression.fullmatch(text) for text in (path, module, "/" + path, "/" + module) if text)


# The first number in a path that is a name, or a part of one, of its own: 'layers_3', 'h.3', 'blocks/3'.
LAYER_NUMBER = re.compile(r"(?:(?<=^)|(?<=[/_.]))\d+(?=[/_.]|$)")


def layer_number(path: str) -> int | None:
    """The number of the layer that a path lies in, or None.

    Example:
      >>> layer_number("encoder/layers_3/mlp_1/kernel"), layer_number("encoder/mlp1/kernel")
      (3, None)
    """
    number = LAYER_NUMBER.search(path)
    return int(number.group()) if number else None


def hits(what: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches, in their order.

    Args:
      what: how the error names the pattern.

    Raises:
      ValueError: it matches none, or is no regular expression.

    Example:
      >>> hits("exclude='.*/q'", ".*/q", ["a/q/kernel", "a/v/kernel"])
      ['a/q/kernel']
    """
    paths = list(paths)
    found = [path for path in paths if matches(pattern, path)]
    if not found:
        raise ValueError(no_match(what, pattern, paths))
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"Pattern {pattern!r} is not a regular expression: {error}.") from None


def no_match(what: str, pattern: str, paths: Iterable[str]) -> str:
    """The message for a pattern that matched nothing: names the nearest paths."""
    modules = list(dict.fromkeys(p.rpartition("/")[0] or p for p in paths))
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
    near = difflib.get_close_matches(plain, modules, n=3, cutoff=0.0)
    return (
        f"{what} matches no weight. Nearest paths: {', '.join(near) or 'none'}. A pattern is a regular expression that must match "
        "the whole path of a weight or of its module; start it with '.*/' to match at any depth."
    )
