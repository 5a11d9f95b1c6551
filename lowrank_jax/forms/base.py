"""What every form is made of: leaves, a view of one linear call, and the protocol.

A form says how factors act. It is a pytree of arrays with pure functions; methods build it, bridges call it. The arrays
a form sees inside a model have no layer axis (a scan has taken its slice); outside they carry the site's batch axes in front.
All-zero factors mean "no change" in every form, which is what makes a layer outside ``layers=`` cost nothing to express.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lowrank_jax.sites import Site

REPLICATED_BELOW = 2**12  # numbers; a collective for less costs more than the copy


class Leaf(NamedTuple):
    """The abstract description of one array of an adapter at one site.

    Attributes:
      shape: shape without the site's batch axes.
      axes: one role an axis: ``'in'`` and ``'out'`` shard like the kernel's, everything else is replicated.
      trains: ``(start, stop)`` as fractions of the training run in which the leaf is trained, or None: frozen for good.
      dtype: storage dtype, or None for the adapter's default (float32).
      anchor: whether the leaf belongs to a frozen anchor, the initial factors whose delta is subtracted.
      count: trainable numbers in the leaf over the whole stack where padding makes it differ from its size.
      state: the leaf is not learned but set by the method's transform as training goes on (a mask, a counter): it travels with the trained
        leaves, gets no gradient and is not counted.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    trains: tuple[float, float] | None = (0.0, 1.0)
    dtype: Any = None
    anchor: bool = False
    count: int | None = None  # type: ignore[assignment]
    state: bool = False


class Call(NamedTuple):
    """One linear call of a model, seen canonically.

    Attributes:
      kind: the site's kind.
      x: the input. dense: ``[*batch, ..., n_in]``; conv: the feature map; embed: integer ids.
      y: the call's own output, ``[*batch, ..., n_out]``.
      kernel: the weight, ``[*batch, n_in, n_out]``.
      linear: ``(x, w [*batch, n_in, k]) -> [..., k]``, the site's own linear operation with another weight.
      rng: a key for dropout, or None outside training.
      bias: the bias that ``y`` holds, ``[*batch, n_out]``, or None.
      signals: what the caller says of each row of the batch, ``{name: [rows]}``; see ``signals=`` of the bridges.
    """

    kind: str
    x: jax.Array
    y: jax.Array
    kernel: jax.Array
    linear: Callable[[jax.Array, jax.Array], jax.Array]
    rng: jax.Array | None = None
    bias: jax.Array | None = None
    signals: Mapping[str, jax.Array] = MappingProxyType({})

    def linear_output(self) -> jax.Array:
        """The call's output without its bias."""
        if self.bias is None:
            return self.y
        bias = self.bias.reshape(*self.bias.shape[:-1], *[1] * (self.y.ndim - self.bias.ndim), self.bias.shape[-1])
        return self.y - bias.astype(self.y.dtype)


@dataclass(frozen=True)
class Record:
    """What a form can do, as data; the conformance suite asserts it both ways.

    Attributes:
      kinds: the site kinds it applies to.
      factored: whether it acts inside the model without forming a dense update.
      delta: whether it has a dense update, so that it can be merged.
      rows: whether each row of a batch may have its own adapter.
      low_rank: whether it converts exactly to a LoRA.
      dense_gradient: whether its backward pass forms one product of the kernel's shape at a time, of which it keeps some entries.
      reads_kernel: whether what it adds depends on the weight itself, so that it cannot act on what another form left of it.
    """

    kinds: frozenset[str]
    factored: bool = True
    delta: bool = True
    rows: bool = True
    low_rank: bool = False
    dense_gradient: bool = False
    reads_kernel: bool = False


class Form(Protocol):
    """The protocol: a pytree of factors.

    ``apply(call)`` gives the adapted output ``[*batch, ..., n_out]``. ``delta(kernel)`` gives the dense update
    ``[*batch, n_in, n_out]`` in float32; ``kernel`` is the canonical weight. ``delta_bias(kernel, bias)`` gives the update of the bias
    ``[*batch, n_out]``, or None: it stays; ``bias`` is None where the module has none. ``transpose()`` is the same map read
    backwards (an embedding used to attend). `KeepsBias` is for forms that leave the bias alone.
    """

    record: ClassVar[Record]

    def apply(self, call: Call) -> jax.Array: ...

    def delta(self, kernel: jax.Array) -> jax.Array: ...

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None: ...

    def transpose(self) -> Form: ...


class KeepsBias:
    """What a form inherits that leaves the bias alone."""

    def delta_bias(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        """None: the bias stays."""
        return None


class UnsupportedError(ValueError):
    """A form or method was asked for something its record does not declare."""


def apply_rows(form: Form, rows: jax.Array, call: Call) -> jax.Array:
    """Applies a different adapter to each row of a batch.

    Args:
      form: factors with a leading axis of adapters, ``[n, ...]``.
      rows: ``[batch]`` int32, the adapter of each row; -1 asks for the base.
      call: the call for the whole batch, whose input and output have the rows in front.

    Returns:
      The adapted output ``[batch, ..., n_out]``.

    Raises:
      UnsupportedError: the form cannot be applied by rows.
      ValueError: the call's batch has another length than ``rows``.
    """
    if not form.record.rows:
        raise UnsupportedError(
            f"{type(form).__name__} cannot apply a different adapter to each row of a batch; merge it instead."
        )
    if call.y.shape[0] != rows.shape[0]:
        raise ValueError(f"rows has {rows.shape[0]} entries but the batch at this site has {call.y.shape[0]} rows.")
    own = jax.tree.map(lambda leaf: leaf[jnp.maximum(rows, 0)], form)
    signals = {name: value[:, None] for name, value in call.signals.items()}
    one = lambda factors, x, y, signals: factors.apply(call._replace(x=x[None], y=y[None], signals=signals))[0]  # noqa: E731
    adapted = jax.vmap(one)(own, call.x, call.y, signals)
    is_base = (rows < 0).reshape(-1, *[1] * (call.y.ndim - 1))
    return jnp.where(is_base, call.y, adapted)


def leaf_spec(leaf: Leaf, site: Site, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec | None:
    """The PartitionSpec of a leaf, inherited from its kernel's; None where the kernel's is unknown.

    A canonical axis made of several kernel axes (heads x head_dim) keeps the sharding of the first of them, which is the
    only one that survives flattening; if a later one is sharded the canonical axis is replicated.

    Args:
      mesh: if given, a leaf that has only one side of the kernel is divided on it over the mesh axes of the other side too, where that is
        even: a factor takes its share of a device's memory, as its kernel does, and so do its gradient and its optimizer state.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> site = Site("x/kernel", "dense", (64, 512), "float32", (), (0,), (1,), spec=PartitionSpec("fsdp", "tensor"))
      >>> b = Leaf((8, 512), ("", "out"))
      >>> leaf_spec(b, site), leaf_spec(b, site, AbstractMesh((4, 2), ("fsdp", "tensor")))
      (P(None, 'tensor'), P(None, ('tensor', 'fsdp')))
    """
    if site.spec is None:
        return None
    full = tuple(site.spec) + (None,) * (len(site.shape) - len(site.spec))
    roles = {"in": _merged(full, site.inputs), "out": _merged(full, site.outputs)}
    own = [roles.get(axis) for axis in leaf.axes]
    sides = [side for side in ("in", "out") if side in leaf.axes]
    if mesh is not None and len(sides) == 1 and math.prod(leaf.shape) >= REPLICATED_BELOW:
        at = leaf.axes.index(sides[0])
        axes = (*_names(own[at]), *_names(roles["out" if sides == ["in"] else "in"]))
        if axes and leaf.shape[at] % math.prod(mesh.shape[axis] for axis in axes) == 0:
            own[at] = axes if len(axes) > 1 else axes[0]
    return PartitionSpec(*(full[a] for a in site.batch), *own)


def leaf_sharding(leaf: Leaf, site: Site, mesh: Any) -> NamedSharding | None:
    """Where a leaf lies on the mesh of its kernel, by `leaf_spec`; None without a mesh, or where the kernel's place is unknown.

    Example:
      >>> leaf_sharding(Leaf((8, 512), ("", "out")), Site("x/kernel", "dense", (64, 512), "float32", (), (0,), (1,)), None)
    """
    spec = None if mesh is None else leaf_spec(leaf, site, mesh)
    return None if spec is None else NamedSharding(mesh, spec)


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _merged(spec: tuple[Any, ...], axes: tuple[int, ...]) -> Any:
    return spec[axes[0]] if axes and all(spec[a] is None for a in axes[1:]) else None
