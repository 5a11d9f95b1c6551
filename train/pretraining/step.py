"""One update of a pre-training run, and one refresh of what the update learns in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from lowrank_jax.models.llama_parts import join_layers, llama_parts, split_layers
from lowrank_jax.optim.layerwise import LayerwiseUpdate, layerwise_update
from lowrank_jax.sites import flatten, with_leaves
from train import gradients
from train.pretraining.methods import is_adapted
from train.pretraining.run import Run, first_weights, rate
from train.sharding import spread
from train.tasks import causal_lm

Batch = dict[str, jax.Array]


class State(NamedTuple):
    """What an update changes; its buffers are donated to the next.

    Attributes:
      weights: ``{path: array}`` trained as they are. factors: the trained leaves of the adapters. optimizer: the states of both.
      step: updates made, int32. ok: False from the first loss or gradient that was not finite; nothing changes from then on.
      loss, weight: sums since the last report, float32.
    """

    weights: dict[str, jax.Array]
    factors: Any
    optimizer: tuple[Any, Any]
    step: jax.Array
    ok: jax.Array
    loss: jax.Array
    weight: jax.Array


class Fixed(NamedTuple):
    """What changes at refreshes only: ``held``, the weights under adapters, ``{path: array}``; ``adapters``, with their frozen leaves."""

    held: dict[str, jax.Array]
    adapters: lr.Adapters


def start(run: Run) -> tuple[State, Fixed]:
    """The first weights and states."""
    params = first_weights(run)
    flat = {path: leaf for path, leaf in flatten(params).items() if isinstance(leaf, jax.Array)}
    weights = {path: leaf for path, leaf in flat.items() if not is_adapted(run.learner, path)}
    held = {path: leaf for path, leaf in flat.items() if path not in weights}
    adapters = lr.Adapters({}, {}, run.plan)
    if run.plan.entries:
        adapters = lr.init(jax.random.key(run.config.seed), with_leaves(run.shapes, flat | _zeros(run, flat)), run.plan)
    factors, frozen = lr.partition(adapters)
    if run.config.layerwise:
        of_weights = _layerwise(run, 1.0).init(*split_layers(with_leaves(run.shapes, weights)))
    else:
        of_weights = run.learner.weights.init(weights)
    optimizer = (of_weights, run.learner.factors.init(factors))
    zero = jnp.float32(0)
    # Leaves may be shared between trees; what is donated must own its buffers.
    state = jax.tree.map(jnp.copy, State(weights, factors, optimizer, jnp.int32(0), jnp.bool_(True), zero, zero))
    return spread(state, run.mesh), spread(jax.tree.map(jnp.copy, Fixed(held, frozen)), run.mesh)


def make_update(run: Run) -> Callable[[State, Fixed, Batch], State]:
    """``(state, fixed, batch) -> state``, to be jitted with the state donated."""
    return _by_layer(run) if run.config.layerwise else _at_once(run)


def _at_once(run: Run) -> Callable[[State, Fixed, Batch], State]:
    key, schedule, clip = jax.random.key(run.config.seed), rate(run), run.config.clip

    def update(state: State, fixed: Fixed, batch: Batch) -> State:
        def loss_sum(
            trained: tuple[Any, Any], batch: Batch, rng: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            weights, factors = trained
            params = parameters(run, State(weights, factors, *state[2:]), fixed)
            total, weight = _loss(run, params, lr.join(factors, fixed.adapters), batch)
            return total, (total, weight)

        rng = jax.random.fold_in(key, state.step)
        trained = (state.weights, state.factors)
        total, weight, grads = gradients.of_mean(loss_sum, trained, batch, rng, run.config.accumulate)
        norm = optax.global_norm(grads)
        ok = state.ok & jnp.isfinite(total) & jnp.isfinite(norm)
        if clip:
            grads = jax.tree.map(lambda g: (g * jnp.minimum(1.0, clip / norm)).astype(g.dtype), grads)
        transforms = (run.learner.weights, run.learner.factors)
        made = [tx.update(*each) for tx, *each in zip(transforms, grads, state.optimizer, trained, strict=True)]
        steps, optimizer = zip(*made, strict=True)
        size = schedule(state.step)
        new = jax.tree.map(lambda w, u: (w - size * u.astype(w.dtype)).astype(w.dtype), trained, steps)
        keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
        (weights, factors), states = jax.tree.map(keep, (new, optimizer), (trained, state.optimizer))
        return State(
            weights, factors, states, state.step + ok.astype(jnp.int32), ok, keep(state.loss + total, state.loss),
            keep(state.weight + weight, state.weight),
        )  # fmt: skip

    return update


def _by_layer(run: Run) -> Callable[[State, Fixed, Batch], State]:
    schedule = rate(run)

    def update(state: State, fixed: Fixed, batch: Batch) -> State:
        # After a fault nothing changes, whatever the loss of the next batch.
        step = _layerwise(run, schedule(state.step), lambda loss: jnp.where(state.ok, loss, jnp.nan))
        before = split_layers(parameters(run, state, fixed))
        stacked, rest, of_weights, mean = step.update(*before, state.optimizer[0], batch)
        weights = flatten(join_layers(stacked, rest))
        ok = jnp.isfinite(mean) & jnp.isfinite(optax.global_norm(weights))
        weight = jnp.where(ok, batch["loss_mask"][:, 1:].sum().astype(jnp.float32), 0)
        loss = state.loss + jnp.where(ok, mean * weight, 0)
        optimizer = (of_weights, state.optimizer[1])
        return State(
            weights, state.factors, optimizer, state.step + ok.astype(jnp.int32), ok, loss, state.weight + weight
        )

    return update


def _layerwise(run: Run, size: Any, checked: Callable[[jax.Array], jax.Array] = lambda loss: loss) -> LayerwiseUpdate:
    """The step of a learning rate, one layer at a time; ``checked`` is done to the loss before the backward pass."""
    assert run.learner.outside is not None
    parts = llama_parts(run.model_config)
    parts = parts._replace(head=lambda *args, head=parts.head: checked(head(*args)))
    layer, outside = (optax.chain(tx, optax.scale(-size)) for tx in (run.learner.weights, run.learner.outside))
    return layerwise_update(parts, layer, outside)


def make_refresh(run: Run) -> Callable[[State, Fixed, Batch], tuple[State, Fixed]]:
    """``(state, fixed, batch) -> (state, fixed)``, to be jitted with both donated."""
    assert run.learner.refresh is not None

    def loss(params: Any, adapters: lr.Adapters, batch: Batch) -> jax.Array:
        total, weight = _loss(run, params, adapters, batch)
        return total / jnp.maximum(weight, 1.0)

    once = run.learner.refresh(loss)

    def refresh(state: State, fixed: Fixed, batch: Batch) -> tuple[State, Fixed]:
        adapters = lr.join(state.factors, fixed.adapters)
        params, own = parameters(run, state, fixed), state.optimizer[1]
        key = jax.random.fold_in(jax.random.key(run.config.seed + 1), state.step)
        params, adapters, own = once(params, adapters, own, batch, key)
        flat = flatten(params)
        factors, frozen = lr.partition(adapters)
        weights = {path: flat[path] for path in state.weights}
        state = state._replace(weights=weights, factors=factors, optimizer=(state.optimizer[0], own))
        return state, Fixed({path: flat[path] for path in fixed.held}, frozen)

    return refresh


def make_evaluate(run: Run) -> Callable[[State, Fixed, Batch], dict[str, jax.Array]]:
    """``(state, fixed, batch) -> {"loss": [rows], "tokens": [rows]}``, sums a row."""
    task = causal_lm()

    def evaluate(state: State, fixed: Fixed, batch: Batch) -> dict[str, jax.Array]:
        adapters = lr.join(state.factors, fixed.adapters)
        return task.outputs(_logits(run, parameters(run, state, fixed), adapters, batch), batch)

    return evaluate


def parameters(run: Run, state: State, fixed: Fixed) -> Any:
    """The model's parameters, without what the adapters add; a base that is not stored is made of zeros."""
    flat = state.weights | fixed.held
    return with_leaves(run.shapes, flat | _zeros(run, flat))


def merged(run: Run, state: State, fixed: Fixed) -> Any:
    """The model as plain parameters."""
    params = parameters(run, state, fixed)
    return lr.merge(params, lr.join(state.factors, fixed.adapters)) if run.plan.entries else params


def _zeros(run: Run, flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.zeros(x.shape, x.dtype) for path, x in flatten(run.shapes).items() if path not in flat}


def _loss(run: Run, params: Any, adapters: lr.Adapters, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return causal_lm().loss(_logits(run, params, adapters, batch), batch)


def _logits(run: Run, params: Any, adapters: lr.Adapters, batch: Batch) -> jax.Array:
    apply = lr.linen.adapted(run.model, adapters) if run.plan.entries else run.model.apply
    return causal_lm().logits(apply, {"params": params}, batch, None)
