"""What one module of the other model is in ours: a weight, or some elements of its stack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site


@dataclass(frozen=True)
class Parameter:
    """A weight that a torch module keeps as a parameter of its own, such as those of all experts of a mixture in one tensor.

    PEFT adapts it through ``target_parameters``, each expert with factors of its own.

    Attributes:
      module: the module's name; name: the parameter's name in it.
      position: its place among the parameters of the module, in the order in which the module defines them. Nothing else in a file tells
        the tensors of two parameters of one module apart.
      flipped: the module multiplies by ``[experts, in, out]`` (``[in, out]`` where there are no experts) and has no ``is_transposed`` that
        says so. PEFT then takes the last axis for the input.
    """

    module: str
    name: str
    position: int = 0
    flipped: bool = False


class Unit(NamedTuple):
    """One module, or one parameter, of the other model.

    Attributes:
      name: the module's, or ``module.parameter``. elements: of the weight's stack, counted row by row; 0 where it is no stack.
    """

    name: str
    elements: tuple[int, ...] = (0,)
    parameter: Parameter | None = None


def depth(site: Site) -> int | None:
    """Elements of the site's stack, None for a plain weight."""
    return math.prod(site.batch_shape) if site.batch else None


def units(site: Site, names: Sequence[str | Parameter]) -> tuple[Unit, ...]:
    """The modules that hold a weight, none if the other model lacks it. Parameters share the stack's elements out evenly.

    Raises:
      ValueError: names that do not go with the stack's elements.
    """
    parameters = bool(names) and isinstance(names[0], Parameter)
    if parameters:  # a function of names is asked for every element, and says the same of those of one tensor
        names = [name for name, _ in itertools.groupby(names)]
    n = depth(site) or 1
    width = max(1, n // len(names)) if parameters else 1
    if names and (parameters or site.kind != "param") and len(names) * width != n:
        raise ValueError(f"{site.path} is a stack of {n}, but {len(names)} module names are known for it.")
    made = []
    for i, name in enumerate(names):
        elements = tuple(range(i * width, (i + 1) * width))
        made.append(
            Unit(f"{name.module}.{name.name}", elements, name) if isinstance(name, Parameter) else Unit(name, elements)
        )
    return tuple(made)


def adapted(entry: Entry) -> dict[int, int]:
    """Where the elements of a stack stand among the leaves of its adapter, ``{element: place}``; others are not adapted."""
    inner = math.prod(entry.site.batch_shape[1:])
    layers = range(math.prod(entry.site.batch_shape[:1])) if entry.layers is None else entry.layers
    elements = [layer * inner + n for layer in layers for n in range(inner)]
    return {element: place for place, element in enumerate(elements)}


def flat(array: Any, entry: Entry) -> np.ndarray:
    """A leaf with its batch axes as one, ``[elements, ...]``."""
    return np.asarray(array).reshape(-1, *np.shape(array)[len(entry.site.batch) :])


def stack(
    site: Site, found: Mapping[int, Mapping[str, np.ndarray]], fill: float = 0.0
) -> tuple[tuple[int, ...] | None, dict[str, np.ndarray]]:
    """Leaves of the elements of a stack that have some, as leaves of the whole.

    Args:
      found: by element, 0 where the weight is no stack; leaves of one name have one shape.
      fill: the value of leaves that change nothing, for elements of an adapted layer that have none.

    Returns:
      The adapted layers (None: all) and the leaves ``[*batch, ...]``.
    """
    inner = math.prod(site.batch_shape[1:])
    layers = sorted({element // inner for element in found})
    batch = (len(layers), *site.batch_shape[1:]) if site.batch else ()
    leaves = {}
    for name, first in next(iter(found.values())).items():
        dtype = first.dtype
        for of in found.values():
            dtype = jnp.promote_types(dtype, of[name].dtype)
        whole = np.full((len(layers) * inner, *first.shape), fill, dtype)
        for element, of in found.items():
            whole[layers.index(element // inner) * inner + element % inner] = of[name]
        leaves[name] = whole.reshape(*batch, *first.shape)
    complete = not site.batch or len(layers) == site.batch_shape[0]
    return None if complete else tuple(layers), leaves
