"""SpIEL's steps: Adam in which every entry has an age of its own, or SM3 on the rows and columns of sparse entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SpielMoments(NamedTuple):
    """Adam's moments, kept corrected for their bias, so that the seed of a new entry is the mean itself.

    Attributes:
      mean, square: ``{path: {leaf: array}}`` float32, of gradients and of their squares. Of SpIEL's leaves ``v`` alone has them, and only
        where its steps are Adam's.
      age: the same of int32: the gradients that they hold, for each entry of a ``v``, one number for any other leaf.
    """

    mean: Any
    square: Any
    age: Any


def scale_by_spiel(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, sm3_eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam in which every entry has its own age, or SM3, whichever the method's ``growth`` goes with. Other leaves get Adam.

    Scaling Sparse Fine-Tuning to Large Language Models (SpIEL, arXiv 2401.16405). With ``growth='gradient'`` a value's moments are
    corrected by the number of gradients that they hold: an entry that came with five has an age of five, whatever the step. With
    ``growth='momentum'`` there are no moments: the step is ``g / sqrt(nu + sm3_eps)`` with ``nu = min(row_max[i], column_max[j]) + g^2``,
    from the accumulators that the method itself keeps (`reselect_entries`). Those follow the gradients that `with_methods` is given:
    what is chained in front of this, such as clipping, reaches ``g`` alone.

    Decay is chained behind; values are changes of a weight, so it pulls to the pre-trained one::

        tx = optax.chain(lr.optim.scale_by_spiel(), optax.add_decayed_weights(1.0), optax.scale_by_learning_rate(1e-4))
        tx = lr.optim.with_methods(tx, plan, total_steps)

    Moments are float32 whatever the values are. In the release an age leaves the gradient of the step itself out, which lengthens the
    first step of an entry of five equal gradients by 4%, and ``eps`` is added before the correction; here a constant gradient gives
    ``g / (|g| + eps)`` at every age.

    Args:
      b1, b2, eps: Adam's. sm3_eps: under SM3's root.

    Raises:
      ValueError: a decay outside [0, 1), or, from ``update``, no parameters.

    Example:
      >>> zeros = {"x": {"v": jnp.zeros(2), "row": jnp.zeros(2), "column": jnp.array([0.0, 3.0])}}
      >>> tx = scale_by_spiel()
      >>> gradient = {"x": {**zeros["x"], "v": jnp.array([4.0, -0.5])}}
      >>> tx.update(gradient, tx.init(zeros), zeros)[0]["x"]["v"].round(3).tolist()
      [1.0, -1.0]
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"scale_by_spiel({name}={value}): expected a decay in [0, 1).")

    def init(params: Any) -> SpielMoments:
        own = _with_moments(params)
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)  # noqa: E731
        each = {path: {n: x.shape if is_spiel(params[path]) else () for n, x in of.items()} for path, of in own.items()}
        age = {path: {n: jnp.zeros(shape, jnp.int32) for n, shape in of.items()} for path, of in each.items()}
        return SpielMoments(zeros(), zeros(), age)

    def update(updates: Any, state: SpielMoments, params: Any = None, **extra: Any) -> tuple[Any, SpielMoments]:
        if params is None:
            raise ValueError("scale_by_spiel: it needs the parameters; call update(gradients, state, params).")
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), _with_moments(updates))
        age = jax.tree.map(lambda n: n + 1, state.age)
        averaged = lambda old, x, b: jax.tree.map(lambda m, g, n: m + _weight(b, n) * (g - m), old, x, age)  # noqa: E731
        mean = averaged(state.mean, wide, b1)
        square = averaged(state.square, jax.tree.map(jnp.square, wide), b2)
        steps = jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + eps), mean, square)
        new = {}
        for path, leaves in updates.items():
            made = dict(steps.get(path, {}))
            if has_sm3(leaves):
                g = leaves["v"].astype(jnp.float32)
                made["v"] = g * jax.lax.rsqrt(sm3(params[path], g) + sm3_eps)
            new[path] = {n: made[n].astype(u.dtype) if n in made else jnp.zeros_like(u) for n, u in leaves.items()}
        return new, SpielMoments(mean, square, age)

    return optax.GradientTransformationExtraArgs(init, update)


def is_spiel(leaves: Mapping[str, Any]) -> bool:
    """Whether these are the leaves of a weight with SpIEL's entries."""
    return {"v", "row", "column"} <= leaves.keys()


def has_sm3(leaves: Mapping[str, Any]) -> bool:
    """Whether their steps are SM3's."""
    return is_spiel(leaves) and "row_max" in leaves


def sm3(leaves: Mapping[str, jax.Array], g: jax.Array) -> jax.Array:
    """``min(row_max[i], column_max[j]) + g^2`` ``[*batch, k]`` at the entries' rows and columns.

    Example:
      >>> leaves = {"row": jnp.array([1.0]), "column": jnp.array([0.0]), "row_max": jnp.array([0.0, 4.0]), "column_max": jnp.array([3.0])}
      >>> sm3(leaves, jnp.array([2.0])).tolist()
      [7.0]
    """
    at = lambda side: jnp.take_along_axis(leaves[f"{side}_max"], leaves[side].astype(jnp.int32), -1)  # noqa: E731
    return jnp.minimum(at("row"), at("column")) + g**2


def _with_moments(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What Adam steps on: of SpIEL's leaves the values, without SM3, and everything else."""
    own = {
        p: {n: x for n, x in of.items() if n == "v" or not is_spiel(of)} for p, of in tree.items() if not has_sm3(of)
    }
    return {path: leaves for path, leaves in own.items() if leaves}


def _weight(b: float, age: jax.Array) -> jax.Array:
    """What the newest of ``age`` gradients weighs in a mean that decays by ``b``, corrected for its bias: ``(1 - b) / (1 - b^age)``."""
    if b == 0:
        return jnp.ones(age.shape, jnp.float32)
    # expm1, because 1 - b^age in float32 loses digits for a b near one.
    return (1 - b) / -jnp.expm1(age.astype(jnp.float32) * math.log(b))
