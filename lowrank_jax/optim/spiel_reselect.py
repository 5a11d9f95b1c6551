"""SpIEL-AG: entries are exchanged between two steps, by dense gradients that the caller computes.

No transform sees such a gradient: a form's backward pass keeps the entries of one, and a leaf whose gradient was all of it would cost what
the method saves. A leaf whose gradient carried candidates instead would not survive accumulation, which adds gradients up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_jax.batching import over_batch
from lowrank_jax.optim.entry_swaps import flat_positions, swap, swap_share, swapped_leaves
from lowrank_jax.optim.spiel_steps import SpielMoments
from lowrank_jax.plan import Entry, Plan, local_kernel
from lowrank_jax.sites import flatten, named_sharding

if TYPE_CHECKING:
    from lowrank_jax.adapters import Adapters


def spiel_reselect(
    adapters: Adapters, state: Any, gradients: Iterable[Any], step: int, total_steps: int
) -> tuple[Adapters, Any]:
    """Exchanges the entries of `spiel` with ``growth='gradient'`` between two steps, and hands the new ones their moments.

    The accumulated gradients of Scaling Sparse Fine-Tuning to Large Language Models (SpIEL-AG, arXiv 2401.16405). In each layer the k
    largest entries of the first dense gradient are candidates, and later gradients are only read there. The share of `swap_share` of the
    entries, those of smallest ``|v|``, are to leave; as many candidates with the largest sums of gradients, among those that are not
    active or are to leave, are to come. What is both stays as it is; every other newcomer takes the slot of a leaver, with a value of
    zero, the means of its gradients and of their squares as moments, and their number as its age.

    The paper sums the gradients of training steps while they pass. Here the caller computes them, for a few batches at the parameters
    of the moment: in that this is a reconstruction. A gradient counts as one update; where updates accumulate, pass their means.
    Gradients are read one after another, so a generator holds one at a time::

        if lr.optim.reselection_due(plan, step):  # after so many updates
            adapters = lr.join(train, frozen)
            dense = (jax.grad(loss)(params, adapters, batch) for batch in batches)  # of the base; the release takes five
            adapters, state = lr.optim.spiel_reselect(adapters, state, dense, step, total_steps)
            train, frozen = lr.partition(adapters)

    Args:
      adapters: whole. state: the optimizer's, with `scale_by_spiel` somewhere in it.
      gradients: each a tree of parameters, or a part of one, with the gradient of every such weight in the weight's own layout.
      step: updates made; how many entries are exchanged follows from it and the method's fields. total_steps: length of the run.

    Returns:
      ``(adapters, state)``, new values of the same shapes in the same places, so that nothing is compiled again.

    Raises:
      ValueError: no gradients, one that is missing, of another shape or not finite (by path), no such weight, or a state without moments.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.zeros((2, 3))}}
      >>> plan = lr.plan(params, {"x": lr.spiel(density=0.34, growth="gradient")})
      >>> adapters = lr.init(jax.random.key(0), params, plan)
      >>> state = lr.optim.scale_by_spiel().init(lr.partition(adapters)[0])
      >>> gradient = {"x": {"kernel": jnp.array([[0.0, 3.0, 1.0], [0.0, -2.0, 0.0]])}}
      >>> adapters, state = spiel_reselect(adapters, state, [gradient], step=5, total_steps=100)
      >>> sorted(zip(*(adapters.sites["x/kernel"][n].tolist() for n in ("row", "column")), strict=True))
      [(0.0, 1.0), (1.0, 1.0)]
    """
    entries = {e.site.path: e for e in adapters.plan.entries if _by_gradients(e)}
    if not entries:
        raise ValueError(
            "spiel_reselect: no weight of this adapter has spiel(growth='gradient'); with growth='momentum' it needs no call."
        )
    moments = _find(state, entries)
    seen: dict[str, _Seen] = {}
    for gradient in gradients:
        flat = flatten(gradient)
        for path, entry in entries.items():
            dense = _dense(entry, flat)
            k = adapters.sites[path]["v"].shape[-1]
            seen[path] = _more(seen[path], dense) if path in seen else _first(dense, k)
    if not seen:
        raise ValueError("spiel_reselect: there are no gradients; pass at least one.")
    sites, trees = dict(adapters.sites), [dict(tree) for tree in moments]
    for path, entry in entries.items():
        if not bool(jnp.isfinite(seen[path].square).all()):
            raise ValueError(f"spiel_reselect: a gradient of {path} is not finite. Check the batches.")
        fields = dict(entry.method.config)
        share = swap_share(step, total_steps, fields["first"], fields["share"], fields["schedule"])
        own = tuple(tree[path]["v"] for tree in trees)
        changed, new = _swapped_by_gradients(sites[path], own, seen[path], share, (entry.site.n_in, entry.site.n_out))
        sites[path] = {**sites[path], **{name: _placed(x, sites[path][name]) for name, x in changed.items()}}
        for tree, x in zip(trees, new, strict=True):
            tree[path] = {"v": _placed(x, tree[path]["v"])}
    fresh = SpielMoments(*trees)
    state = jax.tree.map(lambda x: fresh if x is moments else x, state, is_leaf=lambda x: isinstance(x, SpielMoments))
    return adapters.replace(sites=sites), state


class _Seen(NamedTuple):
    """Of the candidates ``[*batch, k]`` of a weight: their positions, and the sums of their gradients and of the squares of ``number``."""

    positions: jax.Array
    total: jax.Array
    square: jax.Array
    number: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def _first(dense: jax.Array, k: int) -> _Seen:
    positions = jax.lax.top_k(jnp.abs(dense), k)[1].astype(jnp.int32)
    g = jnp.take_along_axis(dense, positions, -1)
    return _Seen(positions, g, g**2, jnp.int32(1))


@jax.jit
def _more(seen: _Seen, dense: jax.Array) -> _Seen:
    g = jnp.take_along_axis(dense, seen.positions, -1)
    return seen._replace(total=seen.total + g, square=seen.square + g**2, number=seen.number + 1)


@functools.partial(jax.jit, static_argnums=4)
def _swapped_by_gradients(
    leaves: Mapping[str, jax.Array],
    moments: tuple[jax.Array, ...],
    seen: _Seen,
    share: jax.Array,
    shape: tuple[int, int],
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """New values and positions, and new ``(mean, square, age)``."""
    here = flat_positions(leaves["row"], leaves["column"], shape)
    swaps = over_batch(functools.partial(swap, share=share, size=shape[0] * shape[1]), here.ndim - 1)
    done = swaps(leaves["v"], here, seen.positions, jnp.abs(seen.total))
    of = lambda x: jnp.take_along_axis(x, done.source, -1) / seen.number  # noqa: E731
    seeds = (of(seen.total), of(seen.square), seen.number)
    new = tuple(jnp.where(done.leaves, seed, old) for seed, old in zip(seeds, moments, strict=True))
    return swapped_leaves(leaves["v"], done, shape[1]), new


def _placed(x: jax.Array, like: jax.Array) -> jax.Array:
    """On a mesh, where the old value lay: what a candidate's place followed from was divided as the weight is."""
    sharding = named_sharding(like)
    return x if sharding is None else jax.device_put(x, sharding)


def _by_gradients(entry: Entry) -> bool:
    return entry.method.name == "spiel" and dict(entry.method.config)["growth"] == "gradient"


def reselected(plan: Plan) -> frozenset[str]:
    """The weights whose entries `spiel_reselect` exchanges: those of `spiel` with ``growth='gradient'``.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.zeros((2, 3))}}
      >>> reselected(lr.plan(params, {"x": lr.spiel(density=0.5, growth="gradient")}))
      frozenset({'x/kernel'})
    """
    return frozenset(entry.site.path for entry in plan.entries if _by_gradients(entry))


def reselection_due(plan: Plan, step: int) -> bool:
    """Whether `spiel_reselect` is to be called after so many updates, by the fields ``first`` and ``every`` of the method.

    Raises:
      ValueError: several rules that do not agree on when.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.zeros((2, 3))}}
      >>> plan = lr.plan(params, {"x": lr.spiel(density=0.5, growth="gradient", first=5, every=20)})
      >>> [step for step in range(50) if reselection_due(plan, step)]
      [5, 25, 45]
    """
    fields = [dict(entry.method.config) for entry in plan.entries if _by_gradients(entry)]
    when = {(own["first"], own["every"]) for own in fields}
    if len(when) > 1:
        raise ValueError(
            f"spiel: rules with growth='gradient' exchange entries at different updates (first, every): {sorted(when)}; expected the same "
            "of all."
        )
    return any(step >= first and (step - first) % every == 0 for first, every in when)


def _find(state: Any, entries: Mapping[str, Entry]) -> SpielMoments:
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SpielMoments))
    for one in found:
        if isinstance(one, SpielMoments) and all(path in one.mean for path in entries):
            return one
    raise ValueError(
        f"spiel_reselect: the optimizer's state holds no moments of {next(iter(entries))}. Chain lowrank_jax.optim.scale_by_spiel() in "
        "place of Adam, and pass the state of this adapter's training."
    )


def _dense(entry: Entry, flat: Mapping[str, Any]) -> jax.Array:
    """A weight's gradient as the method sees it, float32, every matrix flat."""
    path, shape = entry.site.path, entry.site.shape
    if path not in flat:
        raise ValueError(
            f"spiel_reselect: the gradients hold no {path}. Pass trees like the parameters, with all that spiel adapts."
        )
    if tuple(flat[path].shape) != shape:
        raise ValueError(
            f"spiel_reselect: the gradient of {path} has shape {tuple(flat[path].shape)}, expected {shape}. Differentiate with respect to "
            "the base parameters."
        )
    dense = local_kernel(entry, jnp.asarray(flat[path])).astype(jnp.float32)
    return dense.reshape(*dense.shape[:-2], -1)
