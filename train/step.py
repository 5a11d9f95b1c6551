"""One update: loss, gradient of the trained leaves, optimizer, and a flag that stops everything once a number is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

import lowrank_jax as lr
from lowrank_jax.hosts import wait
from train import gradients, sharding
from train.job import Job
from train.tasks import Task


class State(NamedTuple):
    """What a step changes; its buffers are donated to the next.

    Attributes:
      train: the trained leaves. optimizer: their optimizer state.
      step: updates made, int32. ok: False from the first loss or gradient that was not finite; nothing changes from then on.
      loss, weight: sums since the last report, float32.
    """

    train: Any
    optimizer: Any
    step: jax.Array
    ok: jax.Array
    loss: jax.Array
    weight: jax.Array


def start(
    train: Any, optimizer: Any, step: Any = 0, loss: Any = 0.0, weight: Any = 0.0, mesh: Mesh | None = None
) -> State:
    """A state that owns its buffers: leaves may be shared with the base or with an anchor, which must outlive donation."""
    state = State(train, optimizer, jnp.int32(step), jnp.bool_(True), jnp.float32(loss), jnp.float32(weight))
    return jax.tree.map(jnp.copy, sharding.spread(state, mesh))


class Stepper:
    """The compiled update of one phase; one compilation for each shape of a batch.

    Attributes:
      compiled: ``{shapes: compiled}``. peak: the most that `peak_bytes` gives for one of them, 0 before the first call.
    """

    def __init__(
        self, job: Job, tx: optax.GradientTransformation, on_compile: Callable[[int], None] = lambda width: None
    ):
        self.compiled: dict[Any, Any] = {}
        self.peak = 0
        self._mesh, self._on_compile = job.mesh, on_compile
        self._update = sharding.within(job.mesh, make_update(job.config, job.model, job.task, tx))

    def __call__(self, state: State, frozen: lr.Adapters, params: Any, batch: Mapping[str, np.ndarray]) -> State:
        inputs = sharding.put_batch(batch, self._mesh)
        key = tuple((name, value.shape) for name, value in sorted(batch.items()))
        if key not in self.compiled:
            self._on_compile(batch["tokens"].shape[1])
            # Without the pin XLA may choose to replicate what the gradient of a sharded factor becomes.
            shardings = None if self._mesh is None else jax.tree.map(lambda x: x.sharding, state)
            jitted = jax.jit(self._update, donate_argnums=0, out_shardings=shardings)
            self.compiled[key] = jitted.lower(state, frozen, params, inputs).compile()
            self.peak = max(self.peak, peak_bytes(self.compiled[key]))
            # Processes compile at their own pace; collectives on CPUs wait for half a minute only.
            wait("compilation of an update")
        return self.compiled[key](state, frozen, params, inputs)


def peak_bytes(compiled: Any) -> int:
    """Bytes that a compiled step needs on a device: arguments (base, adapter, optimizer state, batch), results and temporaries."""
    m = compiled.memory_analysis()
    return m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def make_update(
    config: ml_collections.ConfigDict, model: nn.Module, task: Task, tx: optax.GradientTransformation
) -> Callable[[State, lr.Adapters, Any, Any], State]:
    """``(state, frozen, params, batch) -> state``, to be jitted. Base and frozen leaves are arguments, not constants."""
    key = jax.random.key(config.seed)

    def update(state: State, frozen: lr.Adapters, params: Any, batch: Any) -> State:
        def loss_sum(train: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            adapters = lr.join(train, frozen)
            apply = lr.linen.adapted(model, adapters)
            total, weight = task.loss(task.logits(apply, {"params": params}, batch, {"dropout": rng}), batch)
            # The sum is divided by the weight later; the penalty is not a mean over examples.
            return total + weight * lr.penalty(params, adapters, rng), (total, weight)

        rng = jax.random.fold_in(key, state.step)
        total, weight, grads = gradients.of_mean(loss_sum, state.train, batch, rng, config.accumulate)
        updates, optimizer = tx.update(grads, state.optimizer, state.train)
        train = optax.apply_updates(state.train, updates)
        ok = state.ok & jnp.isfinite(total) & jnp.isfinite(optax.global_norm(grads))
        keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
        return State(
            jax.tree.map(keep, train, state.train), jax.tree.map(keep, optimizer, state.optimizer), state.step + ok.astype(jnp.int32),
            ok, keep(state.loss + total, state.loss), keep(state.weight + weight, state.weight),
        )  # fmt: skip

    return update
