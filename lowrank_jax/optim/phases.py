"""Optimizers over the trained part of an adapter: the methods' own transforms, and the change from one phase to the next."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lowrank_jax.plan import Plan


def with_methods(tx: optax.GradientTransformation, plan: Plan, total_steps: int) -> optax.GradientTransformation:
    """An optimizer followed by what the plan's methods add to it, such as LaMDA's row freezing.

    The methods come last, so what they do to an update (zero it) is final: weight decay and momentum included.

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
    owners = {entry.site.path: entry.method for entry in plan.entries if entry.method.transform is not None}
    transforms = {str(method): method.transform(total_steps) for method in owners.values() if method.transform}
    if not transforms:
        return tx

    def labels(train: Any) -> Any:
        return {
            path: {name: str(owners[path]) if path in owners else "" for name in leaves}
            for path, leaves in train.items()
        }

    return optax.chain(tx, optax.partition({"": optax.identity(), **transforms}, labels))


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
