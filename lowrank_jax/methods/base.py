"""What a method is: a named tuple of pure functions that turn parameters into the factors of a form.

A method is one paper and one small file. It says which leaves it keeps at a site, how they start and how they become factors;
everything else (apply, merge, sharding, checkpoints, export) belongs to the form and is already written.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import optax

from lowrank_jax.forms import Form, Leaf
from lowrank_jax.sites import Site

Leaves = dict[str, jax.Array]

# What `lowrank_jax.collect` can gather at a site, beside the kernel that needs no data:
# ``gradient [*batch, n_in, n_out]`` mean gradient of the loss with respect to the weight;
# ``covariance [*batch, n_in, n_in]`` mean of x x^T over the inputs;
# ``contribution [*batch]`` how much of the loss's change from a base to a tuned model goes through the weight.
STATISTICS = ("gradient", "covariance", "contribution")


class Given(NamedTuple):
    """What an initialiser may read of a site, all float32; None: its method does not ask for it.

    Attributes:
      kernel: the canonical weight ``[*batch, n_in, n_out]``. gradient, covariance, contribution: see `STATISTICS`.
    """

    kernel: jax.Array | None = None
    gradient: jax.Array | None = None
    covariance: jax.Array | None = None
    contribution: jax.Array | None = None

    def need(self, name: str) -> jax.Array:
        """One of them that the method's ``needs`` names."""
        value = getattr(self, name)
        assert value is not None, f"the method's `needs` does not name {name!r}"
        return value


class Context(NamedTuple):
    """What surrounds a method's sites when its leaves become factors.

    Attributes:
      shared: the leaves common to its sites, ``{name: array}``.
      key: the randomness of one training step, the same at every site (fold a hash of the site's path in to tell them apart); None
        outside training.
    """

    shared: Mapping[str, jax.Array] = MappingProxyType({})
    key: jax.Array | None = None


class Seen(NamedTuple):
    """One site as a penalty sees it: the site, its leaves, and the canonical weight in its storage dtype."""

    site: Site
    leaves: Mapping[str, jax.Array]
    kernel: jax.Array


@dataclass(frozen=True)
class Method:
    """A recipe for adapters. Equal configurations are equal methods.

    Attributes:
      form: the form it makes.
      leaves: ``site -> {name: Leaf}``, the abstract description of what is kept at a site; raises ValueError where the site
        does not fit (a rank above the dimension).
      init: ``(key, site, given) -> {name: array}``; ``given`` holds what ``needs`` names, see `Given`.
      expand: ``(site, leaves, context) -> form``; see `Context`. Leaves of a folded anchor are absent.
      anchor: ``(site, leaves) -> form`` whose delta is subtracted from the base, or None: the method has no anchor.
      shared: ``sites -> {name: Leaf}`` kept once for all sites of the method; init_shared: ``(key, sites) -> {name: array}``.
      transform: ``total_steps -> optax transform`` that runs after the optimizer on this method's trainable leaves,
        ``{path: {leaf: update}}``, of all its sites at once; ``update`` gets the raw ``gradients`` by that name. None: nothing to add.
      penalty: ``(seen, context) -> scalar`` added to the loss; ``seen`` is ``{path: Seen}``, all sites of the method. None: nothing.
      allocate: ``(sites, given) -> {path: Method}`` chooses each site's own method when a plan is made, from ``{path: Given}``.
      compact: ``(site, leaves, shared) -> (method, leaves)``, a smaller method that acts the same once training is over (zero
        directions dropped, bits packed), numpy in and out; None: it is as small as it gets.
      kinds: the site kinds it applies to; None: those of its form.
      exact_init: whether the delta at init is exactly zero; False: to rounding of the weights, or as the docstring says.
      needs: what ``init`` and ``allocate`` read: ``kernel`` (the weight) and names of `STATISTICS`.
      name, config: what it was made from, for equality, checkpoints and tables.
    """

    form: type[Any] = field(compare=False)
    leaves: Callable[[Site], dict[str, Leaf]] = field(compare=False)
    init: Callable[[jax.Array, Site, Given], Leaves] = field(compare=False)
    expand: Callable[[Site, Mapping[str, jax.Array], Context], Form] = field(compare=False)
    anchor: Callable[[Site, Mapping[str, jax.Array]], Form] | None = field(default=None, compare=False)
    shared: Callable[[tuple[Site, ...]], dict[str, Leaf]] | None = field(default=None, compare=False)
    init_shared: Callable[[jax.Array, tuple[Site, ...]], Leaves] | None = field(default=None, compare=False)
    transform: Callable[[int], optax.GradientTransformation] | None = field(default=None, compare=False)
    penalty: Callable[[Mapping[str, Seen], Context], jax.Array] | None = field(default=None, compare=False)
    allocate: Callable[[Mapping[str, Site], Mapping[str, Given]], dict[str, Method]] | None = field(
        default=None, compare=False
    )
    compact: Callable[[Site, Mapping[str, Any], Mapping[str, Any]], tuple[Method, dict[str, Any]]] | None = field(
        default=None, compare=False
    )
    kinds: frozenset[str] | None = field(default=None, compare=False)
    exact_init: bool = field(default=True, compare=False)
    needs: frozenset[str] = field(default=frozenset(), compare=False)
    name: str = ""
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def site_kinds(self) -> frozenset[str]:
        """The site kinds it applies to."""
        return self.form.record.kinds if self.kinds is None else self.kinds

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.config)})"


_FACTORIES: dict[str, Callable[..., Method]] = {}
M = TypeVar("M", bound=Callable[..., Method])


def method(factory: M) -> M:
    """Registers a function that makes a `Method`: gives the result its name and configuration, and checks the arguments.

    Raises (from the wrapped function):
      TypeError: a field the method does not have; names the nearest.
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: Any, **fields: Any) -> Method:
        unknown = [f for f in fields if f not in signature.parameters]
        if unknown:
            near = difflib.get_close_matches(unknown[0], signature.parameters, n=1, cutoff=0.4)
            raise TypeError(
                f"{factory.__name__} has no field {unknown[0]!r}{f'; did you mean {near[0]!r}?' if near else '.'} "
                f"Its fields: {', '.join(signature.parameters)}."
            )
        bound = signature.bind(*args, **fields)
        bound.apply_defaults()
        config = tuple((k, _as_tuples(v)) for k, v in bound.arguments.items())
        made = factory(**dict(config))
        object.__setattr__(made, "name", factory.__name__)
        object.__setattr__(made, "config", config)
        return made

    _FACTORIES[factory.__name__] = make
    return make  # type: ignore[return-value]


def build(name: str, config: Mapping[str, Any] | None = None) -> Method:
    """The method called ``name``, from its fields; the inverse of ``(method.name, method.config)``.

    Raises:
      ValueError: no such method; names the nearest. TypeError: an unknown field.

    Example:
      >>> build("lora", {"rank": 4}).name
      'lora'
    """
    if name not in _FACTORIES:
        near = difflib.get_close_matches(name, _FACTORIES, n=1, cutoff=0.3)
        raise ValueError(
            f"Unknown method {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} Known: {', '.join(sorted(_FACTORIES))}."
        )
    return _FACTORIES[name](**(config or {}))


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again at every depth."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def names() -> tuple[str, ...]:
    """The names of all registered methods."""
    return tuple(sorted(_FACTORIES))


def check_rank(name: str, rank: int, site: Site, limit: int | None = None) -> None:
    """Raises a ValueError that names the site unless ``1 <= rank <= limit`` (default: the site's smaller dimension)."""
    limit = site.max_rank if limit is None else limit
    if not 1 <= rank <= limit:
        raise ValueError(
            f"{name} at {site.path}: rank {rank} is not between 1 and {limit} (the weight is {site.n_in} x {site.n_out}). "
            f"Choose a rank of at most {limit}, or exclude the site."
        )


def random_a(key: jax.Array, shape: tuple[int, ...], init: str = "kaiming") -> jax.Array:
    """A random input-side factor ``[*batch, n_in, r]``: uniform in +-1/sqrt(n_in), or normal with deviation 1/r."""
    if init == "gaussian":
        return jax.random.normal(key, shape) / shape[-1]
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def scaling(rank: int, alpha: float | None, rank_stabilised: bool = False) -> float:
    """``alpha / rank`` or ``alpha / sqrt(rank)``; alpha defaults to the rank. Raises a ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"rank={rank}: expected a rank of at least 1.")
    alpha = rank if alpha is None else alpha
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def check_dropout(name: str, dropout: float) -> None:
    """Raises a ValueError unless ``0 <= dropout < 1``."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}(dropout={dropout}): expected a probability in [0, 1).")
