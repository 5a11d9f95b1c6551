"""Statistics of a model's weights on data: what data-driven initialisations and rank allocation read."""

from __future__ import annotations

import difflib
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.hosts import leads, on_host

_PROBES = 4


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics by kind and weight, and fingerprints of the weights they were collected on.

    Attributes:
      values: ``{kind: {path: array}}``, float32, canonical: ``gradient [*batch, n_in, n_out]``, ``covariance [*batch, n_in, n_in]``,
        ``contribution [*batch]``.
      fingerprints: ``{path: [5]}`` of the weights, see `fingerprint`.
      batches: how many batches they are the mean of.

    Example:
      >>> weight = jnp.eye(2)
      >>> stats = Statistics({"gradient": {"x/kernel": weight}}, {"x/kernel": fingerprint(weight)}, batches=1)
      >>> stats.of("gradient", "x/kernel", weight).shape
      (2, 2)
    """

    values: Mapping[str, Mapping[str, jax.Array]]
    fingerprints: Mapping[str, jax.Array]
    batches: int = 0

    def of(self, kind: str, path: str, weight: Any) -> jax.Array:
        """One statistic of one weight.

        Raises:
          ValueError: it was not collected, or on other weights; names what there is.
        """
        known = self.values.get(kind, {})
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
            there = f"the nearest is {near[0]}" if near else f"there is only {', '.join(self.values) or 'nothing'}"
            raise ValueError(
                f"{path}: its {kind} was not collected ({there}). Gather it with lowrank_jax.{collector(kind)}."
            )
        concrete = hasattr(weight, "__array__") and not isinstance(weight, jax.core.Tracer)
        if concrete and not _agree(fingerprint(weight), self.fingerprints[path]):
            raise ValueError(
                f"{path}: its {kind} was collected on another weight than this model's. Collect the statistics on these parameters."
            )
        return known[path]

    def __or__(self, other: Statistics) -> Statistics:
        """Both together; where both have a statistic, the other's.

        Raises:
          ValueError: they are of different weights; names one.
        """
        for path in self.fingerprints.keys() & other.fingerprints.keys():
            if not _agree(self.fingerprints[path], other.fingerprints[path]):
                raise ValueError(
                    f"{path}: the two statistics were collected on different weights and cannot be joined."
                )
        kinds = {*self.values, *other.values}
        values = {kind: {**self.values.get(kind, {}), **other.values.get(kind, {})} for kind in kinds}
        return Statistics(values, {**self.fingerprints, **other.fingerprints}, max(self.batches, other.batches))

    def save(self, file: str | os.PathLike[str]) -> pathlib.Path:
        """Writes everything to one safetensors file, by way of a temporary name; `load` reads it. Of several hosts all call, one writes."""
        from lowrank_jax.models.tensors import save_safetensors

        tensors = {f"{kind}:{path}": on_host(x) for kind, of in self.values.items() for path, x in of.items()}
        tensors |= {f"fingerprint:{path}": on_host(x) for path, x in self.fingerprints.items()}
        tensors["batches:"] = np.array([self.batches], np.int32)
        if leads():
            save_safetensors(pathlib.Path(file), tensors)
        return pathlib.Path(file)


def load(file: str | os.PathLike[str]) -> Statistics:
    """Reads what `Statistics.save` wrote.

    Raises:
      lowrank_jax.models.tensors.CorruptFileError: a damaged file.

    Example:
      >>> import tempfile
      >>> stats = Statistics({"gradient": {"x": jnp.ones((1, 1))}}, {"x": fingerprint(jnp.ones((1, 1)))}, batches=3)
      >>> load(stats.save(tempfile.mkdtemp() + "/stats.safetensors")).batches
      3
    """
    from lowrank_jax.models.tensors import open_safetensors

    values: dict[str, dict[str, jax.Array]] = {}
    for name, tensor in open_safetensors(pathlib.Path(file)).items():
        kind, _, path = name.partition(":")
        values.setdefault(kind, {})[path] = jnp.asarray(tensor.read())
    prints, batches = values.pop("fingerprint", {}), values.pop("batches")[""]
    return Statistics(values, prints, int(batches[0]))


def collector(kind: str) -> str:
    """The function of the library that gathers a kind of statistic."""
    return "contributions" if kind == "contribution" else "collect"


@jax.jit
def fingerprint(weight: jax.Array) -> jax.Array:
    """The norm of a weight and four fixed projections, ``[5]`` float32: equal weights agree, other weights differ by about their norm.

    Example:
      >>> fingerprint(jnp.ones((3, 2))).shape
      (5,)
    """
    matrix = jnp.asarray(weight, jnp.float32).reshape(-1, weight.shape[-1] if weight.ndim else 1)
    rows, columns = (jnp.arange(n, dtype=jnp.float32) for n in matrix.shape)
    k = jnp.arange(1, _PROBES + 1, dtype=jnp.float32)[:, None]
    projections = jnp.einsum("kr,rc,kc->k", jnp.cos(k * rows + k), matrix, jnp.cos((k + 0.5) * columns))
    return jnp.concatenate([jnp.linalg.norm(matrix)[None], projections])


def _agree(one: jax.Array, two: jax.Array) -> bool:
    ours, theirs = np.asarray(one), np.asarray(two)
    # Rounding to bfloat16 moves a projection by far less than this; another weight moves it by about its norm.
    return bool(np.abs(ours - theirs).max() <= 0.05 * max(ours[0], theirs[0]))


def check_finite(values: Mapping[str, Mapping[str, jax.Array]]) -> None:
    """Raises a ValueError that names the first of ``{kind: {path: array}}`` with a NaN or infinity."""
    for kind, of in values.items():
        for path, value in of.items():
            if not bool(jnp.isfinite(value).all()):
                raise ValueError(
                    f"The {kind} of {path} is not finite. Check the batches, or lower the scale of the loss."
                )
