"""Sparse changes of a model's parameters, as values: applied, taken back, scaled, added up, and kept in files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lowrank_jax.sites import flatten, with_leaves


@struct.dataclass
class SparseDelta:
    """A sparse change of parameters: a pytree, to be added to a base, scaled, added to others, and kept in a file.

    Attributes:
      indices: ``{path: [n]}`` int32, ascending and all different, in the flattened weight.
      values: ``{path: [n]}`` float32, what is added there.
      whole: ``{path: array}``, weights that take the place of the base's, such as a head.
      shapes: ``((path, shape), ...)`` of the weights with entries (static).

    Example:
      >>> task = SparseDelta.between({"w": jnp.zeros(4)}, {"w": jnp.array([0.0, 2.0, 0.0, 1.0])})
      >>> language = SparseDelta.between({"w": jnp.zeros(4)}, {"w": jnp.array([0.0, 1.0, 5.0, 0.0])})
      >>> (task + language.scale(0.5)).apply({"w": jnp.ones(4)})["w"].tolist()
      [1.0, 3.5, 3.5, 2.0]
    """

    indices: dict[str, jax.Array]
    values: dict[str, jax.Array]
    whole: dict[str, jax.Array]
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False)

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> SparseDelta: ...

    @classmethod
    def between(cls, start: Any, tuned: Any, mask: Any = None, smallest: float = 1e-7) -> SparseDelta:
        """What turns ``start`` into ``tuned``. Runs on the host.

        Args:
          mask: what was trained, as `top_changes` gives it: weights whose mask is one ``True`` are stored whole, and what moved outside
            the mask is an error. None: whatever moved, as entries.
          smallest: changes up to here are dropped; the release's 1e-7.

        Raises:
          ValueError: a weight that is missing, of another shape, not finite, too large for int32 positions, or moved outside the mask.
        """
        old, new, masks = flatten(start), flatten(tuned), {} if mask is None else flatten(mask)
        made: dict[str, dict[str, jax.Array]] = {"indices": {}, "values": {}, "whole": {}}
        for path, leaf in old.items():
            check_weight(path, new, tuple(leaf.shape), "the tuned parameters")
            within = np.asarray(masks.get(path, np.ones(leaf.shape, bool)))
            if path in masks and within.ndim == 0 and within:
                made["whole"][path] = jnp.asarray(new[path])
                continue
            if leaf.size > np.iinfo(np.int32).max:
                raise ValueError(
                    f"SparseDelta: {path} has {leaf.size} entries, too many for int32 positions; freeze it."
                )
            change = (np.asarray(new[path], np.float32) - np.asarray(leaf, np.float32)).reshape(-1)
            if not np.isfinite(change).all():
                raise ValueError(f"SparseDelta: the change of {path} is not finite. Check the training.")
            outside = change[~np.broadcast_to(within, leaf.shape).reshape(-1)]
            if outside.any():
                raise ValueError(
                    f"SparseDelta: {np.count_nonzero(outside)} entries of {path} moved outside the mask. Chain "
                    "lowrank_jax.lt_sft.mask_updates(mask) last, behind weight decay."
                )
            here = np.flatnonzero(~(np.abs(change) <= smallest))
            if len(here):
                made["indices"][path], made["values"][path] = jnp.asarray(here, jnp.int32), jnp.asarray(change[here])
        return cls(**made, shapes=tuple((path, tuple(old[path].shape)) for path in made["indices"]))

    def apply(self, params: Any, whole: bool = True) -> Any:
        """The parameters with the change: added in float32, stored in their own dtype; all other entries keep their bits.

        Args:
          whole: whether the weights stored whole take their places; False for a language on a model with another head.

        Raises:
          ValueError: a weight that is missing or of another shape.
        """
        changed = self._added(params, 1.0)
        if not whole:
            return changed
        flat = flatten(params)
        for path, value in self.whole.items():
            check_weight(path, flat, tuple(value.shape), "these parameters")
        return with_leaves(changed, {path: jnp.asarray(x, flat[path].dtype) for path, x in self.whole.items()})

    def revert(self, params: Any) -> Any:
        """The inverse of `apply`, to rounding. Weights stored whole stay: what they replaced is not known."""
        return self._added(params, -1.0)

    def scale(self, factor: jax.Array | float) -> SparseDelta:
        """The change times a factor; weights stored whole stay as they are."""
        return self.replace(values={path: x * factor for path, x in self.values.items()})

    def __add__(self, other: SparseDelta) -> SparseDelta:
        """Both changes: where both have an entry, the sum. The order does not matter. Runs on the host.

        Raises:
          ValueError: weights of different shapes, or one that both store whole.
        """
        shapes = dict(self.shapes)
        for path, shape in other.shapes:
            if shapes.setdefault(path, shape) != shape:
                raise ValueError(f"{path} has shape {shapes[path]} in one of these deltas and {shape} in the other.")
        twice = sorted(self.whole.keys() & other.whole.keys())
        if twice:
            raise ValueError(
                f"{twice[0]} is whole in both of these deltas; drop it from one: delta.replace(whole={{}})."
            )
        indices, values = {}, {}
        for path in shapes:
            both = [delta for delta in (self, other) if path in delta.indices]
            here, where = np.unique(np.concatenate([d.indices[path] for d in both]), return_inverse=True)
            total = np.zeros(len(here), np.float32)
            np.add.at(total, where, np.concatenate([d.values[path] for d in both]))
            indices[path], values[path] = jnp.asarray(here), jnp.asarray(total)
        return SparseDelta(indices, values, {**self.whole, **other.whole}, tuple(sorted(shapes.items())))

    def save(self, file: str | os.PathLike[str]) -> pathlib.Path:
        """Writes one safetensors file, by way of a temporary name; `load_delta` reads it. Eight bytes an entry."""
        from lowrank_jax.models.tensors import save_safetensors

        kept = {"indices": self.indices, "values": self.values, "whole": self.whole}
        tensors = {f"{kind}:{path}": np.asarray(x) for kind, of in kept.items() for path, x in of.items()}
        tensors |= {f"shape:{path}": np.array(shape, np.int64) for path, shape in self.shapes}
        save_safetensors(pathlib.Path(file), tensors)
        return pathlib.Path(file)

    def _added(self, params: Any, sign: float) -> Any:
        flat, new = flatten(params), {}
        for path, shape in self.shapes:
            check_weight(path, flat, shape, "these parameters")
            new[path] = _add(jnp.asarray(flat[path]), self.indices[path], self.values[path], sign)
        return with_leaves(params, new)


@jax.jit
def _add(weight: jax.Array, indices: jax.Array, values: jax.Array, sign: float) -> jax.Array:
    # By coordinates: a weight that lies on a mesh is not flattened.
    at = jnp.unravel_index(indices, weight.shape)
    return weight.at[at].set((weight[at].astype(jnp.float32) + sign * values).astype(weight.dtype))


def load_delta(file: str | os.PathLike[str]) -> SparseDelta:
    """Reads what `SparseDelta.save` wrote.

    Raises:
      ValueError: a file of something else, or one in which a part is missing or does not fit.
      lowrank_jax.models.tensors.CorruptFileError: a damaged one.

    Example:
      >>> import tempfile
      >>> delta = SparseDelta.between({"w": jnp.zeros(3)}, {"w": jnp.array([0.0, 0.0, 1.0])})
      >>> load_delta(delta.save(tempfile.mkdtemp() + "/delta.safetensors")).indices["w"].tolist()
      [2]
    """
    from lowrank_jax.models.tensors import open_safetensors

    parts: dict[str, dict[str, np.ndarray]] = {"indices": {}, "values": {}, "whole": {}, "shape": {}}
    for name, tensor in open_safetensors(pathlib.Path(file)).items():
        kind, _, path = name.partition(":")
        if kind not in parts:
            raise ValueError(
                f"{file}: {name!r} is not part of a sparse delta; expected a file that SparseDelta.save wrote."
            )
        parts[kind][path] = tensor.read()
    for path in sorted(parts["indices"].keys() | parts["values"].keys() | parts["shape"].keys()):
        missing = [kind for kind in ("indices", "values", "shape") if path not in parts[kind]]
        if missing:
            raise ValueError(f"{file} holds no {missing[0]} of {path}; it is not whole. Write it again.")
    for path, here in parts["indices"].items():
        size = np.prod(parts["shape"][path])
        if (
            len(here) != len(parts["values"][path])
            or (here < 0).any()
            or (here >= size).any()
            or (np.diff(here) <= 0).any()
        ):
            raise ValueError(
                f"{file}: the entries of {path} are not ascending positions among {size}. Write the file again."
            )
    shapes = tuple((path, tuple(shape.tolist())) for path, shape in parts.pop("shape").items())
    arrays = {kind: {path: jnp.asarray(x) for path, x in of.items()} for kind, of in parts.items()}
    return SparseDelta(**arrays, shapes=shapes)


def check_weight(path: str, flat: Mapping[str, Any], shape: tuple[int, ...], where: str) -> None:
    """Raises a ValueError that names the weight unless ``flat`` has it, of that shape."""
    if path not in flat:
        raise ValueError(f"{path} is missing in {where}. Pass a tree of the same model.")
    if tuple(flat[path].shape) != shape:
        raise ValueError(
            f"{path} has shape {tuple(flat[path].shape)} in {where}, expected {shape}. Pass a tree of the same model."
        )
