"""One weight and its adapter, without a model: for tests of what a method's factors are and how they train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lr

PATH = "layer/kernel"


def kernel(*shape: int, seed: int = 0) -> jax.Array:
    """A random weight."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params_of(weight: jax.Array) -> dict[str, Any]:
    """The parameters ``{"layer": {"kernel": weight}}``; a third axis in front is a stack of layers, which its bias shows."""
    bias = {"bias": jnp.zeros((weight.shape[0], weight.shape[2]))} if weight.ndim == 3 else {}
    return {"layer": {"kernel": weight, **bias}}


def adapt(weight: jax.Array, method: Any) -> lr.Adapters:
    """The adapter of a method, or of a rule, on that weight."""
    params = params_of(weight)
    return lr.init(jax.random.key(3), params, lr.plan(params, {"layer/kernel": method}))


def delta(adapters: lr.Adapters, weight: jax.Array) -> jax.Array:
    """The dense update."""
    return lr.expand(adapters)[PATH].delta(weight)


def leaves_of(adapters: lr.Adapters) -> dict[str, np.ndarray]:
    """The adapter's leaves, in float64."""
    return {name: np.asarray(leaf, np.float64) for name, leaf in adapters.sites[PATH].items()}


def loss(train: Any, frozen: lr.Adapters, weight: jax.Array) -> jax.Array:
    """Squared distance of the adapted layer's outputs from random targets."""
    x = kernel(7, weight.shape[-2], seed=1)
    target = kernel(*weight.shape[:-2], 7, weight.shape[-1], seed=2)
    y = x @ (weight + delta(lr.join(train, frozen), weight))
    return jnp.sum((y - target) ** 2)


def training(
    adapters: lr.Adapters, weight: jax.Array, tx: optax.GradientTransformation, total: int, steps: int | None = None
) -> Iterator[lr.Adapters]:
    """The adapter before training and after every step, its phases included; ``tx`` is used as it is."""
    update = jax.jit(tx.update)
    gradient = jax.jit(jax.grad(loss))
    train, frozen = lr.partition(adapters, 0, total)
    state = tx.init(train)
    yield adapters
    for step in range(total if steps is None else steps):
        if step and step in adapters.plan.phases(total):
            train, frozen = lr.partition(lr.join(train, frozen), step, total)
            state = lr.optim.carry_state(tx, state, train)
        updates, state = update(gradient(train, frozen, weight), state, train)
        train = optax.apply_updates(train, updates)
        yield lr.join(train, frozen)
