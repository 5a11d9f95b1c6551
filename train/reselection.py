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
    """Exchanges what `lowrank_jax.spiel` with ``growth='gradient'`` trains; other runs are left alone.

    Raises:
      ValueError: rules that do not agree on when, see `lowrank_jax.optim.reselection_due`.
    """

    def __init__(self, job: Job):
        lr.optim.reselection_due(job.plan, 0)
        self._job, self._paths = job, lr.optim.reselected(job.plan)
        self._gradient = jax.jit(jax.grad(self._loss))

    def due(self, step: int) -> bool:
        """Whether entries are exchanged after this many updates."""
        return bool(self._paths) and lr.optim.reselection_due(self._job.plan, step)

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
