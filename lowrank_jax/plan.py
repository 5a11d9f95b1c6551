"""Plans: which method adapts which weight, decided and checked before anything is computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.forms import Leaf
from lowrank_jax.methods.base import Given, Method, build
from lowrank_jax.plan_table import render
from lowrank_jax.quantized import dense
from lowrank_jax.site_data import from_data, is_numbers, to_data
from lowrank_jax.sites import Site, flatten, hits, layer_number, no_match
from lowrank_jax.sites import sites as find_sites
from lowrank_jax.stats.statistics import Statistics, collector

SHARED = "shared:"  # prefix of shared leaves among the sites of a train tree


@dataclass(frozen=True)
class Rule:
    """A method, and the layers it is restricted to (None: all)."""

    method: Method
    layers: tuple[int, ...] | None = None


def on_layers(method: Method, layers: Iterable[int]) -> Rule:
    """Restricts a method to some layers, by number: of the path (``layers_3/...``) or of a scanned stack.

    Example:
      >>> import lowrank_jax as lr
      >>> on_layers(lr.lora(4), [0, 1]).layers
      (0, 1)
    """
    return Rule(method, tuple(layers))


@dataclass(frozen=True)
class Entry:
    """One site with its method; ``layers`` are the elements of its stack that are adapted (None: all)."""

    site: Site
    method: Method
    layers: tuple[int, ...] | None = None

    @functools.cached_property
    def local(self) -> Site:
        """The site as the method sees it: its stack cut down to ``layers``."""
        if self.layers is None:
            return self.site
        shape = list(self.site.shape)
        shape[self.site.batch[0]] = len(self.layers)
        return replace(self.site, shape=tuple(shape))

    @functools.cached_property
    def leaves(self) -> dict[str, Leaf]:
        return self.method.leaves(self.local)

    @property
    def route(self) -> str:
        return "factored" if self.site.factored and self.method.form.record.factored else "dense"


@dataclass(frozen=True, eq=False)
class Plan:
    """What adapts what. Printing it shows a table; equality and hash follow the entries.

    Attributes:
      entries: one per adapted weight, in the order of the parameters.
      base_count, base_bytes: parameters of the whole model, and the bytes that hold them (a quantised weight's own).
      total_batch: the stacks, for counting.
    """

    entries: tuple[Entry, ...]
    base_count: int = 0
    base_bytes: int = 0

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Plan) and self.entries == other.entries)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.entries)

    def __str__(self) -> str:
        return render(self)

    @functools.cached_property
    def by_path(self) -> dict[str, Entry]:
        return {entry.site.path: entry for entry in self.entries}

    @functools.cached_property
    def shared(self) -> dict[str, tuple[Method, tuple[Site, ...]]]:
        """``{name: (method, its sites)}`` of the methods that keep leaves common to their sites."""
        groups: dict[str, tuple[Method, tuple[Site, ...]]] = {}
        for entry in self.entries:
            if entry.method.shared is not None:
                _, sites = groups.get(str(entry.method), (entry.method, ()))
                groups[str(entry.method)] = (entry.method, (*sites, entry.local))
        return groups

    @functools.cached_property
    def shared_leaves(self) -> dict[str, dict[str, Leaf]]:
        return {name: method.shared(sites) for name, (method, sites) in self.shared.items() if method.shared}

    def phases(self, total_steps: int) -> tuple[int, ...]:
        """The steps at which the set of trained leaves changes, 0 first.

        Example:
          >>> import jax.numpy as jnp, lowrank_jax as lr
          >>> lr.plan({"x": {"kernel": jnp.zeros((8, 8))}}, {"x": lr.lamda(rank=2, freeze=0.3)}).phases(100)
          (0, 30)
        """
        edges = {0}
        for leaf in self._all_leaves():
            if leaf.trains is not None:
                edges |= {math.ceil(fraction * total_steps - 1e-9) for fraction in leaf.trains}
        return tuple(sorted(step for step in edges if step < total_steps))

    def is_trained(self, leaf: Leaf, step: int = 0, total_steps: int = 1) -> bool:
        """Whether a leaf is trained at a step of a run."""
        if leaf.trains is None:
            return False
        start, stop = (math.ceil(fraction * total_steps - 1e-9) for fraction in leaf.trains)
        return start <= step < stop

    def is_learned(self, leaf: Leaf, step: int = 0, total_steps: int = 1) -> bool:
        """Whether a leaf is trained at a step by its gradient, which a state leaf is not."""
        return not leaf.state and self.is_trained(leaf, step, total_steps)

    @property
    def trainable(self) -> int:
        """Trained parameters at the start of a run."""
        return self.count(0, 1)

    def count(self, step: int, total_steps: int) -> int:
        """Parameters trained at a step of a run, as the paper counts them (padding of a stack left out).

        LaMDA's rows that are already frozen inside a phase still count: they leave the tree at the phase's end.
        """
        total = 0
        for entry in self.entries:
            layers = math.prod(entry.local.batch_shape)
            total += sum(
                _size(leaf, layers) for leaf in entry.leaves.values() if self.is_learned(leaf, step, total_steps)
            )
        for leaves in self.shared_leaves.values():
            total += sum(_size(leaf, 1) for leaf in leaves.values() if self.is_learned(leaf, step, total_steps))
        return total

    def to_config(self) -> list[dict[str, Any]]:
        """The plan as plain data (for JSON): ``from_config(params, config)`` is its inverse."""
        return [
            {
                "path": e.site.path,
                "method": e.method.name,
                "config": {k: list(v) if isinstance(v, tuple) else v for k, v in e.method.config},
                "layers": None if e.layers is None else list(e.layers),
                "site": to_data(e.site),
            }
            for e in self.entries
        ]

    def _all_leaves(self) -> Iterable[Leaf]:
        for entry in self.entries:
            yield from entry.leaves.values()
        for leaves in self.shared_leaves.values():
            yield from leaves.values()


def plan(
    params: Any,
    rules: Mapping[str, Method | Rule],
    *,
    exclude: Sequence[str] = (),
    sites: Mapping[str, Site] | None = None,
    allow_dense: bool = False,
    statistics: Statistics | None = None,
) -> Plan:
    """Decides which method adapts which weight of a model.

    Args:
      params: the model's parameters: a tree of arrays or ShapeDtypeStructs.
      rules: ``{pattern: method}``. A pattern is a regular expression that matches the whole path of a weight or of its module.
        Where several match a weight the most specific wins: the one that matches the fewest weights; of equals, the later.
      exclude: patterns of weights to leave alone, whatever the rules say.
      sites: what `lowrank_jax.linen.sites` or `lowrank_jax.nnx.sites` found; None: what the parameters alone tell.
      allow_dense: whether weights that no bridge can intercept may be adapted by adding a dense update to them.
      statistics: for methods that allocate ranks from data (`lowrank_jax.collect`).

    Raises:
      ValueError: a pattern that matches nothing (names the nearest paths), layers a stack does not have, a rank above a
        dimension, a weight that would go dense without leave.

    Example:
      >>> import jax.numpy as jnp, lowrank_jax as lr
      >>> params = {"layers_0": {"query": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}}
      >>> lr.plan(params, {r".*/query": lr.lora(rank=2)}).trainable
      32
    """
    found = dict(find_sites(params) if sites is None else sites)
    claims: dict[str, list[tuple[int, int, Rule]]] = {}
    for order, (pattern, value) in enumerate(rules.items()):
        rule = value if isinstance(value, Rule) else Rule(value)
        if not isinstance(rule.method, Method):
            raise TypeError(f"Rule for {pattern!r}: expected a method such as lowrank_jax.lora(rank=8), got {value!r}.")
        usable = _usable(pattern, rule, found)
        for path in usable:
            claims.setdefault(path, []).append((len(usable), -order, rule))
    for pattern in exclude:
        for path in hits(f"exclude={pattern!r}", pattern, found):
            claims.pop(path, None)
    chosen = {path: min(claims[path], key=lambda c: c[:2])[2] for path in found if path in claims}
    entries = [Entry(found[path], rule.method, _stack_layers(found[path], rule)) for path, rule in chosen.items()]
    entries = _allocate(entries, params, statistics)
    for entry in entries:
        if not entry.site.factored and entry.method.form.record.factored and not allow_dense:
            raise ValueError(
                f"{entry.site.path} is not a weight of a module that can be intercepted, so {entry.method.name} would add a dense "
                "update to it. Register its module (lowrank_jax.linen.register, lowrank_jax.nnx.register), exclude it, or pass "
                "allow_dense=True."
            )
        _ = entry.leaves  # raises here, naming the site, if the method does not fit
    if not entries:
        raise ValueError("The plan is empty: every weight the rules match is excluded.")
    return _of(entries, flatten(params))


def from_config(params: Any, config: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan that `Plan.to_config` described, for the same model.

    Raises:
      ValueError: no plan, a weight that the model does not have or that has another shape, an unknown method, or one that does not fit.
      TypeError: a field that a method does not have, or of another type.
    """
    flat = flatten(params)
    entries = [_entry_of(item, flat) for item in config]
    if len({entry.site.path for entry in entries}) != len(entries):
        raise ValueError("The saved plan has an entry twice.")
    return _of(entries, flat)


def _entry_of(item: Any, flat: Mapping[str, Any]) -> Entry:
    if not isinstance(item, Mapping) or not {"path", "method", "config", "layers", "site"} <= set(item):
        raise ValueError(f"{str(item)[:80]!r} is no entry of a plan; expected path, method, config, layers, site.")
    path, layers = item["path"], item["layers"]
    if path not in flat:
        raise ValueError(no_match(f"The saved adapter's site {path!r}", str(path), flat))
    site = from_data(path, item["site"], flat[path])
    if layers is not None:
        depth = site.batch_shape[0] if site.scanned else 0
        different = is_numbers(layers) and 0 < len(layers) == len(set(layers))
        if not different or not all(0 <= n < depth for n in layers):
            raise ValueError(f"{path}: layers={str(layers)[:80]}; expected some of the {depth} of its stack.")
    if not isinstance(item["method"], str) or not isinstance(item["config"], Mapping):
        raise ValueError(f"{path}: {str(item['method'])[:80]!r} is no method, or has no fields.")
    entry = Entry(site, build(item["method"], item["config"]), None if layers is None else tuple(layers))
    _ = entry.leaves  # raises here, naming the site, if the method does not fit
    return entry


def _of(entries: Sequence[Entry], flat: Mapping[str, Any]) -> Plan:
    held = [math.prod(part.shape) * jnp.dtype(part.dtype).itemsize for part in jax.tree.leaves(dict(flat))]
    return Plan(tuple(entries), sum(math.prod(leaf.shape) for leaf in flat.values()), sum(held))


def _size(leaf: Leaf, layers: int) -> int:
    return leaf.count if leaf.count is not None else layers * math.prod(leaf.shape)


def _usable(pattern: str, rule: Rule, found: Mapping[str, Site]) -> list[str]:
    matched = hits(f"Pattern {pattern!r}", pattern, found)
    kinds = rule.method.site_kinds
    usable = [path for path in matched if found[path].kind in kinds]
    if not usable:
        raise ValueError(
            f"Pattern {pattern!r} matches {matched[0]} ({found[matched[0]].kind}, shape {found[matched[0]].shape}), but {rule.method.name} "
            f"applies to {', '.join(sorted(kinds))} weights only. If it is a matmul's weight, pass "
            "sites=lowrank_jax.linen.sites(model, ...) "
            "or lowrank_jax.nnx.sites(model), or declare it."
        )
    if rule.layers is not None:
        matched = usable
        usable = [p for p in usable if found[p].scanned or layer_number(p) in rule.layers]
        if not usable:
            raise ValueError(
                f"Pattern {pattern!r} matches {matched[0]}, but nothing in the layers {list(rule.layers)}. Layers are counted by the first "
                "number in a path, or along a scanned stack; experts are not layers."
            )
    return usable


def gather(entry: Entry, weight: Any, statistics: Statistics | None) -> Given:
    """What an entry's method may read: its weight and statistics, canonical, of the adapted layers only.

    Raises:
      ValueError: statistics that were not collected, or from other weights; names the site.
    """
    needs = entry.method.needs
    kernel = local_kernel(entry, jnp.asarray(dense(weight))) if "kernel" in needs else None
    values: dict[str, Any] = {} if kernel is None else {"kernel": kernel}
    for name in sorted(needs - {"kernel"}):
        value = _statistic(entry, name, weight, statistics)
        values[name] = value if entry.layers is None else value[jnp.asarray(entry.layers)]
    return Given(**values)


def check_statistics(flat: Mapping[str, Any], plan: Plan, statistics: Statistics | None) -> None:
    """Raises a ValueError that names the first weight whose method needs a statistic that is missing or of another weight."""
    for entry in plan.entries:
        for name in sorted(entry.method.needs - {"kernel"}):
            _statistic(entry, name, flat[entry.site.path], statistics)


def _statistic(entry: Entry, name: str, weight: Any, statistics: Statistics | None) -> Any:
    if statistics is None:
        raise ValueError(
            f"{entry.method.name} at {entry.site.path} needs the {name} of the weight: gather it with "
            f"lowrank_jax.{collector(name)} and pass statistics=."
        )
    return statistics.of(name, entry.site.path, weight)


def local_kernel(entry: Entry, weight: Any) -> Any:
    """A weight as the entry's method sees it: canonical, its stack cut down to the adapted layers."""
    if entry.site.kind == "param":
        return weight
    matrix = entry.site.canonical(weight)
    return matrix if entry.layers is None else matrix[jnp.asarray(entry.layers)]


def _stack_layers(site: Site, rule: Rule) -> tuple[int, ...] | None:
    # A number in the path of a scanned weight is some module's; which layer it is in, its stack says.
    if rule.layers is None or not site.scanned:
        return None
    depth = site.shape[site.batch[0]]
    outside = [layer for layer in rule.layers if not 0 <= layer < depth]
    if outside:
        raise ValueError(f"{site.path} is a stack of {depth} layers; layers={list(rule.layers)} asks for {outside[0]}.")
    return rule.layers if len(rule.layers) < depth else None


def _allocate(entries: list[Entry], params: Any, statistics: Statistics | None) -> list[Entry]:
    """Lets methods that allocate (LaMDA++) choose each site's own method from the weights or from statistics."""
    groups: dict[Method, list[Entry]] = {}
    for entry in entries:
        if entry.method.allocate is not None:
            groups.setdefault(entry.method, []).append(entry)
    if not groups:
        return entries
    flat = flatten(params)
    own: dict[str, Method] = {}
    for method, members in groups.items():
        given = {}
        for entry in members:
            leaf = flat[entry.site.path]
            if "kernel" in method.needs and not hasattr(leaf, "__array__"):
                raise ValueError(
                    f"{method.name} reads the weights to allocate ranks; {entry.site.path} is only a shape here."
                )
            given[entry.site.path] = gather(entry, leaf, statistics)
        assert method.allocate is not None
        own |= method.allocate({e.site.path: e.local for e in members}, given)
    return [replace(e, method=own[e.site.path]) if e.site.path in own else e for e in entries]
