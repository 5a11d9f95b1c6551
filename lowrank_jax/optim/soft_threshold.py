"""SoRA's proximal step as an optax transform: what the optimizer made of a leaf is drawn towards zero, and stops there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Kind = Literal["soft", "jump"]
Schedule = Literal["linear", "log_linear", "exp_linear"]


class SoftThresholdState(NamedTuple):
    """Number of updates made so far, int32."""

    count: jax.Array  # type: ignore[assignment]


def threshold_stages(first: float, last: float, stages: int, schedule: Schedule = "linear") -> tuple[float, ...]:
    """SoRA's thresholds, one a stage, from ``first`` to ``last``: equally far apart as they are, as exponentials or as logarithms.

    Raises:
      ValueError: no stage, or ``exp_linear`` from 0.

    Example:
      >>> threshold_stages(1.0, 100.0, 3, "exp_linear")
      (1.0, 10.0, 100.0)
    """
    if stages < 1 or (schedule == "exp_linear" and not first > 0):
        raise ValueError(
            f"threshold_stages: {stages} stages, {schedule} from {first}: expected a stage, and more than 0."
        )
    if stages == 1:
        return (last,)
    maps: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        "linear": (np.positive, np.positive),
        "log_linear": (np.exp, np.log),
        "exp_linear": (np.log10, lambda x: 10.0**x),
    }
    there, back = maps[schedule]
    return tuple(back(np.linspace(there(first), there(last), stages)).tolist())


def shrink(x: jax.Array, threshold: Any, kind: Kind = "soft") -> jax.Array:
    """``sign(x) max(|x| - threshold, 0)``, the proximal map of the absolute value.

    ``jump`` is what SoRA's released code does instead: it shrinks, and then zeroes what is below the threshold, so nothing
    survives between 0 and the threshold.

    Example:
      >>> x = jnp.array([3.0, 1.5, 0.5, -1.5])
      >>> shrink(x, 1.0).tolist(), shrink(x, 1.0, "jump").tolist()
      ([2.0, 0.5, 0.0, -0.5], [2.0, 0.0, 0.0, 0.0])
    """
    size = jnp.maximum(jnp.abs(x) - threshold, 0)
    if kind == "jump":
        size = jnp.where(size < threshold, 0, size)
    return jnp.where(size > 0, jnp.sign(x) * size, 0).astype(x.dtype)


def soft_threshold(
    leaf: str, thresholds: float | Sequence[float], total_steps: Any = 1, kind: Kind = "soft"
) -> optax.GradientTransformation:
    """Applies `shrink` to one leaf after every update, so that zeros are exact.

    Sparse Low-rank Adaptation of Pre-trained Language Models (SoRA, arXiv 2311.11696). Chain it after the optimizer: a gradient of
    ``|x|`` in its place would never end on zero. The threshold is per update, that is learning rate times the weight of the L1 norm.

    Args:
      leaf: name of the leaf in a tree ``{path: {leaf: update}}``.
      thresholds: one, or one for each of as many equal stretches of the run. total_steps: length of the run; it may be traced.
      kind: ``soft`` or ``jump``, see `shrink`.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), soft_threshold("g", 0.5))
      >>> params = {"x": {"g": jnp.array([0.75, -0.25])}}
      >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> optax.apply_updates(params, updates)["x"]["g"].tolist()
      [0.25, 0.0]
    """
    levels = np.atleast_1d(np.asarray(thresholds, np.float32))

    def init(params: Any) -> SoftThresholdState:
        return SoftThresholdState(jnp.zeros((), jnp.int32))

    def update(
        updates: Mapping[str, Any], state: SoftThresholdState, params: Any = None
    ) -> tuple[Any, SoftThresholdState]:
        stage = jnp.floor(state.count * len(levels) / jnp.asarray(total_steps, jnp.float32) + 1e-6).astype(jnp.int32)
        threshold = jnp.asarray(levels)[jnp.clip(stage, 0, len(levels) - 1)]

        def drawn(path: str, name: str, u: Any) -> Any:
            if name != leaf:
                return u
            old = params[path][name]
            return shrink(optax.apply_updates(old, u), threshold, kind) - old

        new = {path: {name: drawn(path, name, u) for name, u in leaves.items()} for path, leaves in updates.items()}
        return new, SoftThresholdState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
