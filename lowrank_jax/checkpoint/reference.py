"""What a saved thing belongs to: a reference to its base by name and content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lowrank_jax.quantized import is_quantized
from lowrank_jax.sites import flatten


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another model, plan or format."""


class Base(NamedTuple):
    """A reference to base parameters: a name for people, and the hash of their content."""

    name: str
    hash: str


def read_base(saved: Any, where: str) -> Base:
    """The reference that ``Base._asdict`` gave, from JSON; a CheckpointError if it is none."""
    names = set(saved) if isinstance(saved, Mapping) else set()
    if names != set(Base._fields) or not all(isinstance(value, str) for value in saved.values()):
        raise CheckpointError(
            f"{where}: {str(saved)[:80]!r} is no reference to a base; expected its name and hash. The file is damaged: save it again."
        )
    return Base(**saved)


def check_format(found: Any, known: int, where: str) -> None:
    """Raises a CheckpointError unless a format is the one that is read here; says so if a later version wrote it."""
    if found != known:
        later = type(found) is int and found > known
        remedy = (
            "A later version of lowrank_jax wrote it: update lowrank_jax to read it."
            if later
            else "It is damaged: save it again."
        )
        raise CheckpointError(f"{where}: format {str(found)[:80]}; this version reads {known}. {remedy}")


def base_reference(name: str, params: Any, exclude: Iterable[str] = ()) -> Base:
    """The reference of base parameters: SHA-256 over every leaf's path, dtype, shape and bytes.

    Args:
      params: a tree of arrays; of a quantised weight its codes and scales count.
      exclude: paths that are not part of it, such as a freshly initialised head.

    Example:
      >>> base_reference("m", {"w": np.zeros(2, np.float32)}).hash[:8]
      'e4f441a1'
    """
    skip = set(exclude)
    parts: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        if path not in skip:
            parts |= (
                {f"{path}/{leaf.kind}/{n}": part for n, part in enumerate(jax.tree.leaves(leaf))}
                if is_quantized(leaf)
                else {path: leaf}
            )
    return Base(name, tree_hash(parts))


def tree_hash(leaves: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over ``{path: array}`` in the order of the paths."""
    total = hashlib.sha256()
    for path in sorted(leaves):
        array = np.ascontiguousarray(leaves[path])
        total.update(f"{path}:{array.dtype.name}:{array.shape};".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def check_base(expected: Base, found: Base, where: str) -> None:
    """Raises a CheckpointError that names both bases unless their content is the same."""
    if expected.hash != found.hash:
        raise CheckpointError(
            f"{where}: this belongs to another model: it was made on {found.name} (content {found.hash[:12]}), the base loaded here is "
            f"{expected.name} (content {expected.hash[:12]}). Load the model it was trained on, with the same layout and dtype."
        )
