"""Entries of SpIEL-AG exchanged between two updates of a run, by dense gradients of the batches that come next."""

from __future__ import annotations

from typing import Any

import jax

import lowrank_jax as lr
from lowrank_jax.sites import flatten, with_leaves
from train import sharding, statistics
from train.job import Job
from train.step import State, start

BATCHES = 5  # as in the method's release


class Reselection:
    """Exchanges what `lowrank_jax.spiel` with ``growth='gradient'`` trains, as often as its fields ``first`` and ``every`` say.

    Other runs are left alone.

    Raises:
      ValueError: several rules that do not agree on when.
    """

    def __init__(self, job: Job):
        fields = {e.site.path: dict(e.method.config) for e in job.plan.entries if e.method.name == "spiel"}
        when: dict[str, tuple[int, int]] = {
            path: (own["first"], own["every"]) for path, own in fields.items() if own["growth"] == "gradient"
        }
        if len(set(when.values())) > 1:
            raise ValueError(
                f"spiel: rules with growth='gradient' exchange entries at different updates (first, every): {sorted(set(when.values()))}; "
                "expected the same of all."
            )
        self._job, self._paths = job, set(when)
        self._first, self._every = next(iter(when.values())) if when else (0, 0)
        self._gradient = jax.jit(jax.grad(self._loss))

    def due(self, step: int) -> bool:
        """Whether entries are exchanged after this many updates."""
        return bool(self._paths) and step >= self._first and (step - self._first) % self._every == 0

    def __call__(self, state: State, frozen: lr.Adapters, params: Any, step: int) -> tuple[State, lr.Adapters]:
        """The state and the frozen leaves after ``step`` updates, with new entries; the next batches are read for it."""
        job, adapters, loader = self._job, lr.join(state.train, frozen), self._job.train
        assert loader is not None
        weights = {path: leaf for path, leaf in flatten(params).items() if path in self._paths}
        batches = (loader.training_batch(step + n) for n in range(BATCHES))
        dense = (self._gradient(weights, params, adapters, sharding.put_batch(batch, job.mesh)) for batch in batches)
        adapters, optimizer = lr.optim.spiel_reselect(adapters, state.optimizer, dense, step, job.total_steps)
        train, frozen = lr.partition(adapters, step, job.total_steps)
        return start(train, optimizer, step, state.loss, state.weight, job.mesh), frozen

    def _loss(self, weights: dict[str, jax.Array], params: Any, adapters: lr.Adapters, batch: Any) -> jax.Array:
        job = self._job
        return statistics.make_loss(job.model, job.task, job.mesh)(with_leaves(params, weights), adapters, batch)
