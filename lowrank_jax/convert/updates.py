"""What an adapter adds to a weight, one matrix of its stack at a time: as factors where that is exact, as a dense matrix elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.convert.factors import Factors, factors_of, is_low_rank
from lowrank_jax.forms import Form, UnsupportedError
from lowrank_jax.methods.base import Context
from lowrank_jax.plan import Entry, local_kernel
from lowrank_jax.sites import Site


@dataclass(frozen=True)
class Update:
    """One adapter's update of one weight.

    Attributes:
      entry: the site and its method.
      form: its form, and factors: the form's factors or None, both with one axis ``[matrices]`` for all batch axes.
      kernel: the weight, ``[matrices, n_in, n_out]``; a param: ``[1, *shape]``. None: not needed by the form.
    """

    entry: Entry
    form: Form
    factors: Factors | None
    kernel: jax.Array | None

    @property
    def low_rank(self) -> bool:
        """Whether it is exactly low-rank, and so does not depend on the weight."""
        return is_low_rank(self.form)

    @property
    def numbers(self) -> list[int]:
        """The matrices it changes, numbered in the whole stack of the site."""
        return numbers(self.entry)

    def at(self, number: int) -> Factors | np.ndarray:
        """Its update of a matrix, float32: factors where it has them, dense elsewhere."""
        if self.factors is None:
            return self.dense(number)
        local = self.numbers.index(number)
        return self.factors._replace(a=self.factors.a[local], b=self.factors.b[local])

    def dense(self, number: int) -> np.ndarray:
        """Its update of a matrix as ``[n_in, n_out]`` float32; of a param, in the param's shape."""
        site, local = self.entry.site, self.numbers.index(number)
        kernel = jnp.zeros((site.n_in, site.n_out)) if self.kernel is None else self.kernel[local]
        with jax.default_matmul_precision("highest"):  # a TPU's own is too coarse for what is called exact
            return np.asarray(jax.tree.map(lambda x: x[local], self.form).delta(kernel))


def numbers(entry: Entry) -> list[int]:
    """The matrices that an entry adapts, numbered in the whole stack of its site; batch axes are flattened."""
    inner = math.prod(entry.site.batch_shape[1:])
    layers = range(entry.site.batch_shape[0]) if entry.layers is None and entry.site.batch else entry.layers or (0,)
    return [layer * inner + n for layer in layers for n in range(inner)]


def same_weight(one: Site, other: Site) -> bool:
    """Whether two sites are one weight, however it is stored and laid out."""
    return replace(one, spec=None, dtype="") == replace(other, spec=None, dtype="")


def common_entry(what: str, entries: Sequence[Entry]) -> Entry:
    """The first of several entries of one weight, for the layers that any of them adapts."""
    first, *others = entries
    for other in others:
        if not same_weight(first.site, other.site):
            raise ValueError(
                f"{what}: {first.site.path} is another weight for one adapter: {other.site} is not {first.site}."
            )
    if all(entry.layers == first.layers for entry in entries):
        return first
    depth = first.site.batch_shape[0]
    layers = {layer for entry in entries for layer in (range(depth) if entry.layers is None else entry.layers)}
    return replace(first, layers=None if len(layers) == depth else tuple(sorted(layers)))


def update_of(adapters: Adapters, path: str, flat: Mapping[str, Any] | None) -> Update:
    """The update that an unfolded adapter makes at a site.

    Args:
      flat: the base's parameters by path; None: not at hand, which suits forms that do not read the weight.

    Raises:
      UnsupportedError: an update that is no matrix (a nonlinear form, a change of the bias); names the site. ValueError: the weight is
        needed and not given.
    """
    entry = adapters.plan.by_path[path]
    context = Context(adapters.shared.get(str(entry.method), {}))
    count, axes = math.prod(entry.local.batch_shape), len(entry.site.batch)
    with jax.default_matmul_precision("highest"):
        form = entry.method.expand(entry.local, adapters.sites[path], context)
        form = jax.tree.map(lambda x: x.reshape(count, *x.shape[axes:]), form)
        if is_low_rank(form):
            return Update(entry, form, factors_of(form), None)
    if flat is None:
        raise ValueError(f"{path}: the update of {entry.method.name} depends on the weight; pass params=.")
    kernel = jnp.asarray(local_kernel(entry, flat[path]))
    kernel = kernel.reshape(count, *kernel.shape[axes:])
    try:
        jax.eval_shape(form.delta, kernel)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    bias = flat.get(f"{entry.site.module}/bias".lstrip("/"))
    if entry.site.kind != "param":
        _check_bias(entry, form, kernel, bias)
    return Update(entry, form, None, kernel)


def _check_bias(entry: Entry, form: Form, kernel: jax.Array, bias: Any) -> None:
    if bias is not None:
        bias = jnp.asarray(bias).reshape(*entry.site.batch_shape, -1)
        bias = bias if entry.layers is None else bias[jnp.asarray(entry.layers)]
        bias = bias.reshape(len(kernel), -1)
    change = form.delta_bias(kernel, bias)
    if change is not None and bool(jnp.any(change != 0)):
        raise UnsupportedError(
            f"{entry.site.path}: {entry.method.name} changes the bias too, which an update of the weight cannot hold. "
            "Merge the adapter (lowrank_jax.merge), or train it without a bias."
        )
