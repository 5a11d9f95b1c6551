"""The two steps of a self-tuning network, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.self_tuning.hyper_parameters import HyperParameters, entropy, perturb


class SelfTuningState(NamedTuple):
    """Attributes: params: of the network. hyper: `HyperParameters`. inner, outer: the states of the two optimizers."""

    params: Any
    hyper: HyperParameters
    inner: Any
    outer: Any


class SelfTuning(NamedTuple):
    """Pure functions. init: ``(params, hyper) -> state``. The steps: ``(state, key, batch) -> (state, loss)``."""

    init: Callable[[Any, HyperParameters], SelfTuningState]
    train_step: Callable[[SelfTuningState, jax.Array, Any], tuple[SelfTuningState, jax.Array]]
    validation_step: Callable[[SelfTuningState, jax.Array, Any], tuple[SelfTuningState, jax.Array]]


def self_tuning(
    train_loss: Callable[[Any, jax.Array, Any, jax.Array], jax.Array],
    validation_loss: Callable[[Any, jax.Array, Any], jax.Array],
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    *,
    entropy_weight: float = 1e-3,
    tune_scale: bool = True,
) -> SelfTuning:
    """The two steps that alternate: the network learns its best response around the hyper-parameters, then these follow validation.

    A training step updates ``params`` alone, by ``train_loss`` at perturbed hyper-parameters; it takes no gradient by these, so dropout
    rates, augmentations and integers can be tuned. A validation step updates the hyper-parameters alone, by ``validation_loss -
    entropy_weight * entropy``, whose gradient comes through the gates of `HyperDense` and `HyperConv`. Take turns with
    `is_validation_step`.

    Args:
      train_loss: ``(params, h, batch, key) ->`` a scalar, with ``h [batch, n_h]`` unconstrained: for the layers as it is, through
        `constrain` as rates and strengths, an own one for each example.
      validation_loss: ``(params, h, batch) ->`` a scalar, on other data, without regularisation: no dropout, no augmentation, no penalty.
      inner: of ``params``; the release takes ``optax.sgd(0.01, momentum=0.9)``. outer: of `HyperParameters`; ``optax.adam(3e-3)``.
      entropy_weight: what keeps the perturbations from vanishing; the release's notes use 1e-3, its default is 1e-5.
      tune_scale: False: the scales stay, and validation is at the hyper-parameters themselves, which is the release's default.

    Raises:
      ValueError: a negative weight; from a step, a batch whose arrays differ in their leading axis.

    Example:
      >>> from lowrank_jax.self_tuning import HyperDense, hyper_parameters
      >>> layer = HyperDense(1)
      >>> def loss(params, h, batch, key=None):
      ...     return jnp.mean((layer.apply(params, batch["x"], h) - batch["y"]) ** 2)
      >>> tune = self_tuning(loss, loss, optax.sgd(0.01, momentum=0.9), optax.adam(3e-3))
      >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.zeros((4, 1))}
      >>> hyper = hyper_parameters(jnp.zeros(1))
      >>> params = layer.init(jax.random.key(0), batch["x"], perturb(jax.random.key(1), hyper, 4))
      >>> state, value = tune.train_step(tune.init(params, hyper), jax.random.key(2), batch)
      >>> state, value = jax.jit(tune.validation_step)(state, jax.random.key(3), batch)
    """
    if entropy_weight < 0:
        raise ValueError(f"self_tuning(entropy_weight={entropy_weight}): expected a number of at least 0.")

    def init(params: Any, hyper: HyperParameters) -> SelfTuningState:
        return SelfTuningState(params, hyper, inner.init(params), outer.init(hyper))

    def train_step(state: SelfTuningState, key: jax.Array, batch: Any) -> tuple[SelfTuningState, jax.Array]:
        draw, own = jax.random.split(key)
        h = perturb(draw, state.hyper, _size(batch))
        value, grads = jax.value_and_grad(train_loss)(state.params, h, batch, own)
        updates, opt = inner.update(grads, state.inner, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), inner=opt), value

    def validation_step(state: SelfTuningState, key: jax.Array, batch: Any) -> tuple[SelfTuningState, jax.Array]:
        size = _size(batch)

        def objective(hyper: HyperParameters) -> tuple[jax.Array, jax.Array]:
            if tune_scale:
                value = validation_loss(state.params, perturb(key, hyper, size), batch)
                return value - entropy_weight * entropy(hyper), value
            value = validation_loss(state.params, jnp.broadcast_to(hyper.value, (size, *hyper.value.shape)), batch)
            return value, value

        (_, value), grads = jax.value_and_grad(objective, has_aux=True)(state.hyper)
        updates, opt = outer.update(grads, state.outer, state.hyper)
        hyper = optax.apply_updates(state.hyper, updates)
        if not tune_scale:  # whatever the optimizer makes of a gradient of zero, such as weight decay
            hyper = hyper._replace(raw_scale=state.hyper.raw_scale)
        return state._replace(hyper=hyper, outer=opt), value

    return SelfTuning(init, train_step, validation_step)


def is_validation_step(
    step: jax.Array | int, *, warm_up: int = 0, train_steps: int = 2, validation_steps: int = 1
) -> jax.Array:
    """Whose turn it is: ``warm_up`` training steps, then again and again ``train_steps`` and ``validation_steps``, as the release has it.

    Raises:
      ValueError: fewer than one step of either kind.

    Example:
      >>> [bool(is_validation_step(n, warm_up=1)) for n in range(7)]
      [False, False, False, True, False, False, True]
    """
    if min(train_steps, validation_steps) < 1:
        raise ValueError(
            f"is_validation_step(train_steps={train_steps}, validation_steps={validation_steps}): expected numbers of at least 1."
        )
    since = jnp.asarray(step) - warm_up
    return (since >= 0) & (since % (train_steps + validation_steps) >= train_steps)


def _size(batch: Any) -> int:
    sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)})
    if len(sizes) != 1:
        found = f"has leading axes {sizes}" if sizes else "holds no array with a leading axis"
        raise ValueError(
            f"self_tuning: the batch {found}; expected one, the number of examples, for each of which hyper-parameters are drawn."
        )
    return sizes[0]
