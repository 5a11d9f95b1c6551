"""A learning rate of its own for one leaf of a method."""

from __future__ import annotations

from typing import Any

import jax
import optax


def scale_leaf(leaf: str, factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of one leaf, by name, in a tree ``{path: {leaf: update}}``.

    Chained after the optimizer it is a learning rate, decoupled weight decay included. LoRA+: Efficient Low Rank Adaptation of Large
    Models (arXiv 2402.12354) gives ``b`` a larger one than ``a``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_leaf("b", 16.0)
      >>> updates, _ = tx.update({"site": {"a": jnp.ones(1), "b": jnp.ones(1)}}, tx.init({}))
      >>> updates["site"]
      {'a': Array([1.], dtype=float32), 'b': Array([16.], dtype=float32)}
    """

    def scaled(name: str, u: Any) -> Any:
        return jax.tree.map(lambda x: x * factor, u) if name == leaf else u

    return optax.stateless(
        lambda updates, params: {p: {n: scaled(n, u) for n, u in leaves.items()} for p, leaves in updates.items()}
    )
