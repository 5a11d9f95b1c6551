"""What the bridges know about modules: which are matmuls, and how a stacked weight becomes a site."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lowrank_jax.layout import Labels
from lowrank_jax.sites import Site, describe

Equation = Callable[..., str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matmul:
    """A registered matmul module; see ``lowrank_jax.linen.register``.

    Attributes:
      weight: the name of its parameter, or ``module -> name``.
      equation: ``(module, x, *other call arguments) ->`` einsum of the call, input first, weight second.
      methods: the methods that multiply by the weight.
      argument: which positional argument of the methods is the input.
    """

    weight: str | Callable[[Any], str]
    equation: Equation
    methods: tuple[str, ...] = ("__call__",)
    argument: int = 0

    def weight_of(self, module: Any) -> str:
        """The name of this module's weight."""
        return self.weight if isinstance(self.weight, str) else self.weight(module)

    def input_of(self, args: tuple[Any, ...]) -> Any:
        """The input among a call's positional arguments."""
        return input_of(args, self.argument)

    def labels(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Labels:
        """The axis labels of one call."""
        x = self.input_of(args)
        others = args[: self.argument] + args[self.argument + 1 :]
        return Labels.parse(self.equation(module, x, *others, **kwargs), x.ndim)


def input_of(args: tuple[Any, ...], argument: int = 0) -> Any:
    """A call's input.

    Raises:
      TypeError: the call passes its input by keyword.
    """
    if len(args) <= argument:
        raise TypeError(
            f"An adapted module takes its input as positional argument {argument}; this call passes it by keyword."
        )
    return args[argument]


def registered(table: Mapping[type, Matmul], cls: type) -> tuple[type, Matmul] | None:
    """The nearest registered class among ``cls`` and its bases."""
    return next(((base, table[base]) for base in cls.__mro__ if base in table), None)


def stack_axes(full: Shape, local: Shape) -> Shape:
    """The axes a transform removed from a stacked weight; leading ones where several readings fit.

    Raises:
      ValueError: ``local`` is no slice of ``full``.

    Example:
      >>> stack_axes((4, 3, 8), (4, 8)), stack_axes((4, 4, 4), (4, 4))
      ((1,), (0,))
    """
    for axes in itertools.combinations(range(len(full)), len(full) - len(local)):
        if tuple(n for a, n in enumerate(full) if a not in axes) == local:
            return axes
    raise ValueError(f"A weight of shape {full} is seen by its module as {local}; that is no slice of it.")


def matmul_site(path: str, leaf: Any, local: Shape, labels: Labels) -> Site:
    """A matmul's site; ``local`` is the weight's shape as its module sees it."""
    stacked, kept = _split(leaf, local)
    role = lambda chars: [kept[labels.w.index(c)] for c in chars]  # noqa: E731
    return describe(path, leaf, "dense", batch=[*stacked, *role(labels.batch)], inputs=role(labels.inputs),
                    outputs=role(labels.outputs), scanned=stacked)  # fmt: skip


def conv_site(path: str, leaf: Any, local: Shape) -> Site:
    """A convolution's site: the window and the channels in are one canonical axis."""
    stacked, kept = _split(leaf, local)
    return describe(path, leaf, "conv", batch=stacked, inputs=kept[:-1], outputs=kept[-1:], scanned=stacked)


def embed_site(path: str, leaf: Any, local: Shape) -> Site:
    """An embedding table's site."""
    stacked, kept = _split(leaf, local)
    return describe(path, leaf, "embed", batch=stacked, inputs=kept[:1], outputs=kept[1:], scanned=stacked)


def _split(leaf: Any, local: Shape) -> tuple[Shape, list[int]]:
    stacked = stack_axes(tuple(leaf.shape), local)
    return stacked, [a for a in range(len(leaf.shape)) if a not in stacked]


def agree(seen: dict[str, Site], site: Site) -> None:
    """Adds a site to those seen.

    Raises:
      ValueError: the same weight was seen with other roles of its axes.
    """
    if seen.setdefault(site.path, site) != site:
        raise ValueError(
            f"{site.path} is used by two calls that read its axes differently; it cannot carry one adapter."
        )


def trace(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Runs ``call(*args, **kwargs)`` abstractly; arguments that are no arrays stay as they are."""
    is_array = lambda value: hasattr(value, "shape") and hasattr(value, "dtype")  # noqa: E731
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
    moving = [leaf if is_array(leaf) else None for leaf in leaves]

    def flat(moving: list[Any]) -> None:
        args, kwargs = treedef.unflatten([leaf if m is None else m for m, leaf in zip(moving, leaves, strict=True)])
        call(*args, **kwargs)

    jax.eval_shape(flat, moving)
