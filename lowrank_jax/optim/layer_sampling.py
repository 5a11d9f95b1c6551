"""LISA: a few layers at a time are trained, chosen anew every so many steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.checks import check_choice, check_numbers
from lowrank_jax.sites import LAYER_NUMBER, Site, flatten, with_leaves

Policy = Literal["reset", "keep"]


class LisaState(NamedTuple):
    """Attributes: count: updates made, int32. layers: those being trained, ``[active]`` int32. slots: the inner state of their leaves,
    ``[active, ...]`` (``[layers, ...]`` for ``keep``). rest: the inner state of every leaf outside the layers."""

    count: jax.Array  # type: ignore[assignment]
    layers: jax.Array
    slots: Any
    rest: Any


class Layers:
    """Where the layers of a model are: stacked by a scan, or numbered by the first number in their path.

    Args:
      params: tree of arrays or shapes. sites: of its leaves, which say what is scanned; None: what parameters alone tell.

    Attributes:
      number: of layers.

    Raises:
      ValueError: no layers, or leaves that disagree about how many there are (named).

    Example:
      >>> layers = Layers({"layers_0": {"kernel": jnp.ones((2, 3))}, "layers_1": {"kernel": jnp.ones((2, 3))}, "head": jnp.ones(3)})
      >>> layers.number, {role: x.shape for role, x in layers.take({"layers_0": {"kernel": jnp.ones((2, 3))},
      ...     "layers_1": {"kernel": jnp.ones((2, 3))}, "head": jnp.ones(3)}, jnp.array([1])).items()}
      (2, {'layers_{}/kernel': (1, 2, 3)})
    """

    def __init__(self, params: Any, sites: Mapping[str, Site] | None = None):
        flat = flatten(params)
        self._stacked = {path: site.scanned[0] for path, site in (sites or {}).items() if site.scanned and path in flat}
        self._stacked |= _beside(self._stacked, flat)
        self._numbered: dict[str, dict[int, str]] = {}
        for path in flat:
            found = LAYER_NUMBER.search(path)
            if path not in self._stacked and found:
                role = path[: found.start()] + "{}" + path[found.end() :]
                self._numbered.setdefault(role, {})[int(found.group())] = path
        depths = {path: flat[path].shape[axis] for path, axis in self._stacked.items()}
        depths |= {role: max(paths) + 1 for role, paths in self._numbered.items()}
        if not depths:
            raise ValueError(
                "No layers found: no path has a number in it, and no site is scanned. Pass sites=lowrank_jax.linen.sites(model, ...)."
            )
        self.number = max(depths.values())
        wrong = [role for role, depth in depths.items() if depth != self.number]
        wrong += [role for role, paths in self._numbered.items() if len(paths) != self.number]
        if wrong:
            raise ValueError(
                f"{wrong[0]} is not in each of the {self.number} layers of the model; layers have to be alike to be sampled."
            )

    def paths(self) -> set[str]:
        """The leaves that lie in layers."""
        return set(self._stacked) | {path for paths in self._numbered.values() for path in paths.values()}

    def take(self, tree: Any, which: jax.Array) -> dict[str, jax.Array]:
        """The leaves of some layers, ``{role: [active, ...]}``; ``which``: their numbers ``[active]``, which may be traced."""
        flat = flatten(tree)
        out = {path: jnp.moveaxis(flat[path], axis, 0)[which] for path, axis in self._stacked.items()}
        return out | {role: self._stack(flat, paths)[which] for role, paths in self._numbered.items()}

    def put(self, tree: Any, new: Mapping[str, jax.Array], which: jax.Array) -> Any:
        """A copy of a tree with the leaves of some layers replaced: undoes `take`."""
        flat, out = flatten(tree), {}
        for path, axis in self._stacked.items():
            out[path] = jnp.moveaxis(jnp.moveaxis(flat[path], axis, 0).at[which].set(new[path]), 0, axis)
        for role, paths in self._numbered.items():
            whole = self._stack(flat, paths).at[which].set(new[role])
            out |= {paths[n]: whole[n] for n in range(self.number)}
        return with_leaves(tree, out)

    def _stack(self, flat: Mapping[str, Any], paths: Mapping[int, str]) -> jax.Array:
        return jnp.stack([flat[paths[n]] for n in range(self.number)])


def _beside(stacked: Mapping[str, int], flat: Mapping[str, Any]) -> dict[str, int]:
    """Norms and other parameters that lie in the same stack as the weights, though nothing multiplies by them as a matrix."""
    if not stacked:
        return {}
    stack = "/".join(os.path.commonprefix([path.split("/")[:-1] for path in stacked]))
    depths = {(flat[path].shape[axis],) for path, axis in stacked.items()}
    beside = [path for path in flat if stack and path.startswith(f"{stack}/") and path not in stacked]
    return {path: 0 for path in beside if flat[path].shape[:1] in depths}


def lisa(
    inner: optax.GradientTransformation,
    active: int = 2,
    period: int = 20,
    *,
    state_policy: Policy = "reset",
    sites: Mapping[str, Site] | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning (arXiv 2403.17919).

    Embeddings, head and everything else outside the layers are always trained; of the layers, ``active`` drawn without replacement every
    ``period`` updates. The others do not move, weight decay included. ``inner`` is a whole optimizer, ``optax.adamw(...)``. The state has
    slots for ``active`` layers only, each with a counter of its own.

    What this saves is state: the gradients given are dense. Differentiating with respect to the leaves of the drawn layers alone saves
    nothing under jit, where the layers are not known when the program is compiled: XLA then makes every layer's gradient all the same, and
    a copy of the stack (measured, with the TPU compiler too).

    Args:
      inner: run on each trained layer alone (a schedule inside counts that layer's updates), and once on everything else.
      active: layers trained at a time; the paper takes 2, and 4 for 70B. period: updates before others are drawn.
      state_policy: ``reset``: a layer starts anew whenever it is drawn, which is what saves the memory. ``keep``: as in the released code
        every layer keeps its state while it is not trained; there are slots for all.
      sites: of the parameters, for models whose layers are stacked by a scan. seed: of the draws.

    Raises:
      ValueError: no layers, fewer of them than ``active``, a period of 0, an unknown policy.

    Example:
      >>> params = {f"layers_{n}": {"kernel": jnp.ones((2, 3))} for n in range(4)}
      >>> state = lisa(optax.adam(1e-3), active=1).init(params)
      >>> state.slots[0].mu["layers_{}/kernel"].shape
      (1, 2, 3)
    """
    check_numbers("lisa", active=active, period=period)
    check_choice("lisa", "state_policy", state_policy, get_args(Policy))

    def layers_of(tree: Any) -> Layers:
        layers = Layers(tree, sites)
        if active > layers.number:
            raise ValueError(f"lisa(active={active}): the model has only {layers.number} layers.")
        return layers

    def drawn(count: jax.Array, number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), count // period)
        return jnp.sort(jax.random.permutation(key, number)[:active]).astype(jnp.int32)

    def outside(layers: Layers, tree: Any) -> dict[str, Any]:
        return {path: leaf for path, leaf in flatten(tree).items() if path not in layers.paths()}

    start = jax.vmap(inner.init)

    def init(params: Any) -> LisaState:
        layers, count = layers_of(params), jnp.zeros((), jnp.int32)
        which = drawn(count, layers.number)
        slots = layers.take(params, which if state_policy == "reset" else jnp.arange(layers.number))
        return LisaState(count, which, start(slots), inner.init(outside(layers, params)))

    def update(updates: Any, state: LisaState, params: Any = None) -> tuple[Any, LisaState]:
        layers, which = layers_of(updates), state.layers
        g = layers.take(updates, which)
        here = None if params is None else layers.take(params, which)
        slots = state.slots
        if state_policy == "keep":
            slots = jax.tree.map(lambda x: x[which], slots)
        steps, slots = jax.vmap(inner.update)(g, slots, here)
        if state_policy == "keep":
            slots = jax.tree.map(lambda old, new: old.at[which].set(new), state.slots, slots)
        others, rest = inner.update(
            outside(layers, updates), state.rest, None if params is None else outside(layers, params)
        )
        count = optax.safe_increment(state.count)
        new = drawn(count, layers.number)
        if state_policy == "reset":
            # Also where a layer is drawn twice in a row: the state belongs to a period.
            slots = jax.tree.map(lambda x, fresh: jnp.where(count % period == 0, fresh, x), slots, start(here or g))
        still = with_leaves(jax.tree.map(jnp.zeros_like, updates), others)
        return layers.put(still, steps, which), LisaState(count, new, slots, rest)

    return optax.GradientTransformation(init, update)
