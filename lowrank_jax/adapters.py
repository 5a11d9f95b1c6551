"""Adapter trees: the arrays of a plan's methods, as a value beside the base parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lowrank_jax.forms import Form, UnsupportedError
from lowrank_jax.methods.base import Context, Leaves, Method, Seen, build
from lowrank_jax.plan import SHARED, Entry, Plan, local_kernel
from lowrank_jax.sites import flatten


@struct.dataclass
class Adapters:
    """A pytree of adapter leaves.

    Attributes:
      sites: ``{path: {leaf: array}}``; shared: ``{method: {leaf: array}}`` for leaves common to several sites.
      plan: what made them (static).
      folded: whether the anchors have been moved into the base (static); see `fold`.
      stacked: how many adapters are stacked along a leading axis, or None (static); see `stack`.
    """

    sites: dict[str, Leaves]
    shared: dict[str, Leaves]
    plan: Plan = struct.field(pytree_node=False)
    folded: bool = struct.field(pytree_node=False, default=False)
    stacked: int | None = struct.field(pytree_node=False, default=None)

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> Adapters: ...


class Count(NamedTuple):
    """Sizes of an adapter: parameters trained (at the start), parameters frozen, bytes held."""

    trainable: int
    frozen: int
    bytes: int


Train = dict[str, Leaves]


def check_params(flat: Mapping[str, Any], plan: Plan) -> None:
    """Raises a ValueError that names the weight unless ``flat`` has every weight of the plan, of the right shape."""
    for entry in plan.entries:
        weight = flat.get(entry.site.path)
        if weight is None or tuple(weight.shape) != entry.site.shape:
            got = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise ValueError(
                f"{entry.site.path} {got} in these parameters; the plan was made for shape {entry.site.shape}. "
                "Use the parameters the plan was made from, or make a new plan."
            )


def partition(adapters: Adapters, step: int = 0, total_steps: int = 1) -> tuple[Train, Adapters]:
    """Splits an adapter into what is trained at a step of a run and the rest.

    Args:
      step, total_steps: where in the run; the trained set changes at ``plan.phases(total_steps)`` only.

    Returns:
      ``(train, frozen)``: a plain tree ``{path: {leaf: array}}`` to differentiate, and the adapter without those leaves.
      `join` puts them together again.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.eye(4)}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lamda(rank=2)}))
      >>> sorted(lr.partition(adapters)[0]["layer/kernel"]), sorted(lr.partition(adapters, 50, 100)[0]["layer/kernel"])
      (['b', 'm'], ['m'])
    """
    plan, train, rest, rest_shared = adapters.plan, {}, {}, {}
    for entry in plan.entries:
        path = entry.site.path
        ours, others = _divide(adapters.sites[path], lambda n, e=entry: plan.is_trained(e.leaves[n], step, total_steps))
        rest[path] = others
        if ours:
            train[path] = ours
    for name, described in plan.shared_leaves.items():
        ours, others = _divide(adapters.shared[name], lambda n, d=described: plan.is_trained(d[n], step, total_steps))
        rest_shared[name] = others
        if ours:
            train[SHARED + name] = ours
    return train, adapters.replace(sites=rest, shared=rest_shared)


def _divide(leaves: Leaves, trained: Any) -> tuple[Leaves, Leaves]:
    return {n: v for n, v in leaves.items() if trained(n)}, {n: v for n, v in leaves.items() if not trained(n)}


def join(train: Train, frozen: Adapters) -> Adapters:
    """Inverse of `partition`. Safe inside jit and grad."""
    sites = {path: {**leaves, **train.get(path, {})} for path, leaves in frozen.sites.items()}
    shared = {name: {**leaves, **train.get(SHARED + name, {})} for name, leaves in frozen.shared.items()}
    return frozen.replace(sites=sites, shared=shared)


def mask(adapters: Adapters, step: int = 0, total_steps: int = 1) -> Adapters:
    """The adapter's tree with True at trained leaves: a mask for ``optax.masked`` and its like.

    Prefer `partition`: a mask stops updates, but the gradients and the optimizer state of what it masks still cost memory.
    """
    plan = adapters.plan
    sites = {
        path: {name: plan.is_trained(plan.by_path[path].leaves[name], step, total_steps) for name in leaves}
        for path, leaves in adapters.sites.items()
    }
    shared = {
        group: {name: plan.is_trained(plan.shared_leaves[group][name], step, total_steps) for name in leaves}
        for group, leaves in adapters.shared.items()
    }
    return adapters.replace(sites=sites, shared=shared)


def count(adapters: Adapters) -> Count:
    """Parameters trained at the start, parameters frozen, and bytes."""
    arrays = jax.tree.leaves(adapters)
    total = sum(math.prod(x.shape) for x in arrays)
    plan = adapters.plan
    described = [(plan.by_path[p].leaves, leaves) for p, leaves in adapters.sites.items()]
    described += [(plan.shared_leaves[name], leaves) for name, leaves in adapters.shared.items()]
    trained = sum(math.prod(x.shape) for of, leaves in described for n, x in leaves.items() if plan.is_learned(of[n]))
    return Count(trained, total - trained, sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays))


def expand(adapters: Adapters, key: jax.Array | None = None) -> dict[str, Form]:
    """The forms of every adapted weight, ``{path: form}``: what the bridges apply. Pure and differentiable.

    Runs once a step, outside the model. A stack of adapters gives forms with a leading axis of adapters.

    Args:
      key: of the training step, for methods that draw something in each; None: evaluation.
    """

    def one(sites: dict[str, Leaves], shared: dict[str, Leaves]) -> dict[str, Form]:
        return {
            e.site.path: _expand_site(
                e, sites[e.site.path], Context(shared.get(str(e.method), {}), key), adapters.folded
            )
            for e in adapters.plan.entries
        }

    if adapters.stacked is None:
        return one(adapters.sites, adapters.shared)
    return jax.vmap(one)(adapters.sites, adapters.shared)


def _expand_site(entry: Entry, leaves: Leaves, context: Context, folded: bool) -> Form:
    kept = {n: v for n, v in leaves.items() if not (folded and entry.leaves[n].anchor)}
    form = entry.method.expand(entry.local, kept, context)
    return spread(entry, form)


def spread(entry: Entry, form: Form) -> Form:
    """Lays the factors of some layers into a whole stack; all-zero factors mean no change at the others."""
    if entry.layers is None:
        return form
    depth, rows = entry.site.shape[entry.site.batch[0]], jnp.asarray(entry.layers)
    return jax.tree.map(lambda x: jnp.zeros((depth, *x.shape[1:]), x.dtype).at[rows].set(x), form)


def penalty(params: Any, adapters: Adapters, key: jax.Array | None = None) -> jax.Array:
    """What the plan's methods add to the loss (AdaLoRA's orthogonality, SoRA's sparsity); 0 where they add nothing.

    Args:
      params: the base. key: of the training step, for penalties that look at a part of the weights each time.

    Returns:
      A float32 scalar.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=2)}))
      >>> float(lr.penalty(params, adapters))
      0.0
    """
    flat = flatten(params)
    groups: dict[str, tuple[Method, dict[str, Seen]]] = {}
    for entry in adapters.plan.entries:
        if entry.method.penalty is not None:
            path = entry.site.path
            one = Seen(entry.local, adapters.sites[path], local_kernel(entry, flat[path]))
            groups.setdefault(str(entry.method), (entry.method, {}))[1][path] = one
    total = jnp.float32(0)
    for name, (method, seen) in groups.items():
        assert method.penalty is not None
        total = total + method.penalty(seen, Context(adapters.shared.get(name, {}), key)).astype(jnp.float32)
    return total


def compact(adapters: Adapters) -> Adapters:
    """The same adapter without what training needed and use does not: zeroed directions dropped, bits packed, routing resolved.

    Acts like the argument, to rounding. A method that has no smaller form is left as it is. Runs on the host.

    Raises:
      ValueError: a folded adapter or a stack.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=2)}))
      >>> lr.compact(adapters).plan == adapters.plan
      True
    """
    if adapters.folded or adapters.stacked is not None:
        raise ValueError(
            f"compact: the adapter is {'folded; unfold it first' if adapters.folded else 'a stack; take one of it'}."
        )
    entries, sites = [], dict(adapters.sites)
    for entry in adapters.plan.entries:
        if entry.method.compact is not None:
            shared = jax.tree.map(np.asarray, adapters.shared.get(str(entry.method), {}))
            method, leaves = entry.method.compact(entry.local, jax.tree.map(np.asarray, sites[entry.site.path]), shared)
            sites[entry.site.path] = {name: jnp.asarray(value) for name, value in leaves.items()}
            entry = replace(entry, method=method)
        entries.append(entry)
    plan = replace(adapters.plan, entries=tuple(entries))
    return Adapters(sites, {name: adapters.shared[name] for name in plan.shared}, plan)


def add(first: Adapters, second: Adapters) -> Adapters:
    """Two adapters of one base as one: both act; on a weight that both adapt, the second acts after the first.

    Raises:
      ValueError: folded adapters or stacks. UnsupportedError: a weight whose methods cannot share it; leaves common to several sites
        that differ between the two.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((4, 3))}}
      >>> one = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=2)}))
      >>> lr.count(lr.add(one, one)).trainable
      28
    """
    for x in (first, second):
        if x.folded or x.stacked is not None:
            raise ValueError(
                f"add: an adapter is {'folded; unfold it first' if x.folded else 'a stack; take one of it'}."
            )
    entries = {**first.plan.by_path, **second.plan.by_path}
    sites = {**first.sites, **second.sites}
    for path in first.plan.by_path.keys() & second.plan.by_path.keys():
        one, two = first.plan.by_path[path], second.plan.by_path[path]
        if one.layers != two.layers or one.site != two.site:
            raise UnsupportedError(
                f"{path}: the two adapters act on other layers of it; make both plans for the same layers."
            )
        both = build("chain", {"parts": tuple((m.name, m.config) for m in (one.method, two.method))})
        entries[path] = replace(one, method=both)
        sites[path] = {f"{n}.{k}": v for n, x in enumerate((first, second)) for k, v in x.sites[path].items()}
    for name in first.shared.keys() & second.shared.keys():
        same = jax.tree.map(lambda x, y: np.array_equal(x, y), first.shared[name], second.shared[name])
        if not jax.tree.all(same):
            raise UnsupportedError(
                f"add: both adapters have leaves of {name} common to their sites, and they differ; convert one (lowrank_jax.to_lora), or "
                "use lowrank_jax.combine."
            )
    plan = replace(first.plan, entries=tuple(entries.values()))
    shared = {**first.shared, **second.shared}
    return Adapters(sites, shared, plan)


def stack(adapters: Sequence[Adapters]) -> Adapters:
    """Several adapters of one plan as one tree with a leading axis, for a different adapter on each row of a batch.

    Raises:
      ValueError: none given, different plans, folded or already stacked adapters.
    """
    if not adapters:
        raise ValueError("stack needs at least one adapter.")
    first = adapters[0]
    for n, other in enumerate(adapters):
        if other.plan != first.plan:
            raise ValueError(
                f"stack: adapter {n} has another plan than adapter 0; convert them to the same methods and ranks."
            )
        if other.folded or other.stacked is not None:
            raise ValueError(
                f"stack: adapter {n} is {'folded: unfold it' if other.folded else 'already a stack'}; rows share one base."
            )
    trees = [(a.sites, a.shared) for a in adapters]
    sites, shared = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    return Adapters(sites, shared, first.plan, False, len(adapters))


def take(stacked: Adapters, index: int) -> Adapters:
    """One adapter of a stack; the inverse of `stack`."""
    if stacked.stacked is None or not 0 <= index < stacked.stacked:
        raise ValueError(f"take: index {index} outside a stack of {stacked.stacked} adapters.")
    one = jax.tree.map(lambda x: x[index], stacked)
    return one.replace(stacked=None)
