"""Optimizers over the trained part of an adapter: the methods' own transforms, and the change from one phase to the next."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lowrank_jax.plan import SHARED, Plan


def with_methods(tx: optax.GradientTransformation, plan: Plan, total_steps: int) -> optax.GradientTransformation:
    """An optimizer followed by what the plan's methods add to it, such as LaMDA's row freezing.

    The methods come last, so what they do to an update (zero it) is final: weight decay and momentum included. Each sees the updates of
    all its sites, ``{path: {leaf: update}}``, and the gradients that the optimizer was given as the extra argument ``gradients``.

    Args:
      tx: an optax optimizer for the train tree ``{path: {leaf: array}}`` of `lowrank_jax.partition`.
      total_steps: length of the run in updates, which the methods' schedules refer to.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.eye(4)}}
      >>> plan = lr.plan(params, {"x": lr.lamda(rank=2)})
      >>> train, frozen = lr.partition(lr.init(jax.random.key(0), params, plan))
      >>> tx = lr.optim.with_methods(optax.adamw(1e-3), plan, total_steps=100)
      >>> state = tx.init(train)
    """
    transforms, owned = {}, {}
    for entry in plan.entries:
        if entry.method.transform is not None:
            name = str(entry.method)
            if name not in transforms:
                transforms[name] = optax.with_extra_args_support(entry.method.transform(total_steps))
                owned[name] = {SHARED + name}
            owned[name].add(entry.site.path)
    if not transforms:
        return tx
    tx = optax.with_extra_args_support(tx)

    def part(train: Any, name: str) -> Any:
        return None if train is None else {path: leaves for path, leaves in train.items() if path in owned[name]}

    def init(train: Any) -> Any:
        return tx.init(train), {name: own.init(part(train, name)) for name, own in transforms.items()}

    def update(gradients: Any, state: Any, train: Any = None, **extra: Any) -> Any:
        updates, first = tx.update(gradients, state[0], train, **extra)
        states = {}
        for name, own in transforms.items():
            changed, states[name] = own.update(
                part(updates, name), state[1][name], part(train, name), gradients=part(gradients, name)
            )
            updates = {**updates, **changed}
        return updates, (first, states)

    return optax.GradientTransformationExtraArgs(init, update)


def carry_state(tx: optax.GradientTransformation, old: Any, new_train: Any) -> Any:
    """The optimizer state of the next phase: everything that still exists keeps its value.

    Args:
      tx: the optimizer; old: its state in the phase that ends; new_train: the train tree of the phase that begins.

    Returns:
      ``tx.init(new_train)`` with every array that the old state has under the same path taken from there. What froze is
      dropped with its moments; what begins to train starts afresh; counters go on.
    """
    kept = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(old)[0]}
    fresh, treedef = jax.tree_util.tree_flatten_with_path(tx.init(new_train))
    merged = []
    for path, leaf in fresh:
        previous = kept.get(jax.tree_util.keystr(path))
        same = previous is not None and getattr(previous, "shape", None) == getattr(leaf, "shape", None)
        merged.append(previous if same else leaf)
    return jax.tree.unflatten(treedef, merged)
