"""IncreLoRA's growth as an optax transform: directions that wait in reserve are handed to the weights that need them most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_jax.optim.budget import share_out
from lowrank_jax.optim.importance import Importance, score, smooth, zero_importance

RESERVE = 1e-5  # e of a direction in reserve: enough for its factors to learn, too little to act


class GrowTripletsState(NamedTuple):
    """What growth remembers.

    Attributes:
      count: updates made so far, int32.
      importance: of every layer of every weight, ``{path: [*batch, 1]}``.
      born, woke: ``{path: [*batch, r]}`` float32, the update at which a direction went into reserve and at which it became active;
        -inf: before training, +inf: not yet.
    """

    count: jax.Array  # type: ignore[assignment]
    importance: Importance
    born: dict[str, jax.Array]
    woke: dict[str, jax.Array]


def grow_triplets(
    target: int,
    first: int,
    gain: int,
    top: int,
    start: Any,
    stop: Any,
    ramp: Any = 0,
    betas: tuple[float, float] = (0.85, 0.85),
    penalty: Callable[[Any], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Raises the number of active directions of the most important weights, ``gain`` at a time, until the mean is ``target``.

    IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning (arXiv 2308.12043). The first ``active`` of r
    directions act; the next ``gain`` are in reserve, with ``e`` held at 1e-5 so that ``a`` and ``b`` learn in advance; the others wait
    untouched. At each of equally spaced rounds the ``top`` weights take over their reserve, whose ``e`` trains from then on, and get a
    new one. The total never exceeds ``target`` times the number of weights and ends there; the last reserves are then set to zero.
    Chain it after the optimizer. A direction's moments are zero until it learns; ``ramp`` is its own warm-up.

    The paper scores a weight by ``sum |D * dL/dD| / sqrt(size)`` with the dense update ``D = s a diag(e) b`` and its gradient. That
    gradient is never formed here: ``sum_r a * dL/da`` gives the sums of ``D * dL/dD`` over rows, ``b`` those over columns, and the
    score is the mean of their absolute values, scaled so that it is the paper's, in expectation and up to a constant, where the
    entries of the gradient are independent.

    Args:
      target: the mean rank at the end. first: active directions at first. gain, top: see above.
      start, stop: updates between which the weights grow. ramp: updates over which a new direction's own reach full size. All may be
        traced.
      betas: smoothing of a weight's score and of its variation, whose product ranks the weights.
      penalty: ``params -> scalar``, a part of the loss that says nothing of importance; its gradient is taken out of the score.

    Returns:
      An optax transform on ``{path: {"a" [*batch, n_in, r], "e" [*batch, r], "b" [*batch, r, n_out], "active" [*batch, 1]}}``;
      ``update`` takes the loss's ``gradients`` by name.

    Example:
      >>> leaves = {"a": jnp.ones((2, 3)), "e": jnp.array([0.5, 1e-5, 0.0]), "b": jnp.ones((3, 2)), "active": jnp.ones(1)}
      >>> tx = grow_triplets(target=2, first=1, gain=1, top=1, start=0, stop=1)
      >>> still = {"x": jax.tree.map(jnp.zeros_like, leaves)}
      >>> updates, _ = tx.update(still, tx.init({"x": leaves}), {"x": leaves}, gradients=still)
      >>> new = optax.apply_updates({"x": leaves}, updates)["x"]
      >>> new["active"].tolist(), [round(x, 6) for x in new["e"].tolist()]
      ([2.0], [0.5, 1e-05, 0.0])
    """

    def init(params: Any) -> GrowTripletsState:
        slots = {p: jnp.broadcast_to(jnp.arange(x["e"].shape[-1]), x["e"].shape) for p, x in params.items()}
        since = lambda n: {p: jnp.where(s < n, -jnp.inf, jnp.inf) for p, s in slots.items()}  # noqa: E731
        active = {path: leaves["active"] for path, leaves in params.items()}
        return GrowTripletsState(jnp.zeros((), jnp.int32), zero_importance(active), since(first + gain), since(first))

    def update(
        updates: Mapping[str, Any], state: GrowTripletsState, params: Any = None, *, gradients: Any, **extra: Any
    ) -> tuple[Any, GrowTripletsState]:
        step = optax.safe_increment(state.count)
        task = gradients if penalty is None else jax.tree.map(jnp.subtract, gradients, jax.grad(penalty)(params))
        importance = smooth(state.importance, {p: _sensitivity(params[p], task[p]) for p in params}, betas)
        active, scores = (_joined(tree) for tree in ({p: x["active"] for p, x in params.items()}, score(importance)))
        slots = np.concatenate([np.full(x["active"].size, x["e"].shape[-1]) for x in params.values()])
        last = active.size * target
        rounds = -(-(last - active.size * first) // (gain * top))
        way = jnp.clip((step - start) / jnp.maximum(stop - start, 1), 0, 1)
        planned = active.size * first + jnp.floor(way * rounds + 1e-4) * gain * top
        more = (jnp.minimum(planned, last) - active.sum()).astype(jnp.int32)
        taken = share_out(scores, jnp.minimum(gain, slots - active), more)
        growing = (active + taken).sum() < last
        grown = _split(active + taken, {p: x["active"] for p, x in params.items()})

        new, born, woke = {}, {}, {}
        for path, own in params.items():
            e, slot = own["e"], jnp.arange(own["e"].shape[-1])
            was, now = own["active"], grown[path]
            reserve = (slot >= now) & (slot < now + gain) & growing
            # The factors of a direction follow the optimizer from its birth, e from its awakening.
            factors = _warm(step, state.born[path], ramp) * ((slot < was) | (e != 0))
            held = jnp.where(slot < now, e, jnp.where(reserve, RESERVE, 0).astype(e.dtype)) - e
            new[path] = {
                "a": updates[path]["a"] * factors[..., None, :].astype(own["a"].dtype),
                "b": updates[path]["b"] * factors[..., None].astype(own["b"].dtype),
                "e": jnp.where(slot < was, updates[path]["e"] * _warm(step, state.woke[path], ramp), held).astype(
                    e.dtype
                ),
                "active": now - was,
            }
            at = step.astype(jnp.float32)
            born[path] = jnp.where(reserve, jnp.minimum(state.born[path], at), state.born[path])
            woke[path] = jnp.where(slot < now, jnp.minimum(state.woke[path], at), state.woke[path])
        return new, GrowTripletsState(step, importance, born, woke)

    return optax.GradientTransformationExtraArgs(init, update)


def _sensitivity(leaves: Mapping[str, jax.Array], gradient: Mapping[str, jax.Array]) -> jax.Array:
    """``[*batch, 1]``: sums over rows and over columns of the update times its gradient, absolute, each over the root of their number."""
    a, b = (leaves[n].astype(jnp.float32) * gradient[n].astype(jnp.float32) for n in ("a", "b"))
    rows, columns = jnp.abs(a.sum(-1)), jnp.abs(b.sum(-2))
    each = [x.sum(-1, keepdims=True) / np.sqrt(x.shape[-1]) for x in (rows, columns)]
    return each[0] + each[1]


def _warm(step: jax.Array, since: jax.Array, ramp: Any) -> jax.Array:
    return jnp.clip((step - since) / jnp.maximum(ramp, 1), 0, 1)


def _joined(tree: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in tree.values()])


def _split(flat: jax.Array, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    parts = jnp.split(flat, np.cumsum([x.size for x in like.values()])[:-1])
    return {path: part.reshape(x.shape) for part, (path, x) in zip(parts, like.items(), strict=True)}
