"""The run: from a configuration to a trained adapter, a table and a plot. Import `run` to train from a notebook."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_collections

import lowrank_jax as lr
from lowrank_jax.checkpoint import CheckpointError, Checkpoints, save_adapter
from lowrank_jax.files import sweep, write_file
from lowrank_jax.hosts import leads
from train import base, evaluation, job, optimizer, report, sharding
from train import config as configs
from train.metrics_log import Bar, MetricsLog
from train.processes import Stopped, Termination
from train.reselection import Reselection
from train.step import State, Stepper, start


class TrainingError(ValueError):
    """Training cannot go on: a loss or a gradient is not finite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
      scores: evaluation of the adapter that was kept; test: on the test split, {} without one.
      step: the update it is from; steps: updates made.
      trainable, trainable_end: parameters trained in the first and the last phase.
      peak_bytes: what the compiled update needs on a device, the most of all phases and shapes; 0 if none ran.
      seconds: of training, compilation and evaluation included, over all sessions of the run.
      adapter: the directory written, of adapter_bytes in all. workdir: where everything is.
    """

    scores: dict[str, float]
    test: dict[str, float]
    step: int
    steps: int
    trainable: int
    trainable_end: int
    peak_bytes: int
    seconds: float
    adapter: pathlib.Path
    adapter_bytes: int
    workdir: pathlib.Path


@dataclasses.dataclass
class _Place:
    """Where a run is, beside its arrays; saved with every checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0
    loss: float = 0.0  # sums since the last report
    weight: float = 0.0


class _Pending(NamedTuple):
    """A report whose numbers are still on the devices; it is read once they have the next update to do."""

    step: int
    units: int  # since the last report
    ok: jax.Array
    loss: jax.Array
    weight: jax.Array
    learning_rate: jax.Array


def run(config: ml_collections.ConfigDict) -> Result:
    """Trains what a configuration describes, going on from the newest checkpoint in its workdir if there is one.

    A run that was killed at any moment and started again ends with the same bits as one that was not. It may go on on another mesh and
    with another number of processes. All of them call this; they share the file system of the workdir, where process 0 writes.

    Raises:
      ConfigError, ValueError: see the message. TrainingError: the loss is not finite.
      CheckpointError: the workdir holds another run, or its newest checkpoint is damaged.
      StorageError: the disk of the workdir is full or failing; the same command goes on from the newest checkpoint.
      Stopped: SIGTERM came to one of the processes; a checkpoint is saved.
    """
    return train(job.load(config))


def train(job: job.Job) -> Result:
    """`run` on a loaded job."""
    config, total = job.config, job.total_steps
    directory = configs.workdir(config)
    directory.mkdir(parents=True, exist_ok=True)
    if leads():
        sweep(directory)
        write_file(directory / "config.json", [(configs.to_json(config) + "\n").encode()])
        write_file(directory / "plan.txt", [f"{job.plan}\n".encode()])
    initial = lr.init(jax.random.key(config.seed), job.params, job.plan, statistics=job.statistics)
    with Checkpoints(directory / "checkpoints", job.base, job.plan, config.keep) as checkpoints:
        session = _Session(job, directory, checkpoints, initial)
        with Bar(total, session.place.step, job.task.unit) as bar, Termination() as termination:
            session.train(bar, termination)
        checkpoints.wait()
        kept = session.kept()
    return _finish(job, directory, session, kept)


class _Session:
    """The moving parts of one process's share of a run."""

    def __init__(self, job: job.Job, directory: pathlib.Path, checkpoints: Checkpoints, initial: lr.Adapters):
        assert job.train is not None
        self.job, self.checkpoints, self.peak = job, checkpoints, 0
        self.tx = optimizer.make(job.config, job.plan, job.total_steps)
        self.phases = job.plan.phases(job.total_steps)
        self.forward = evaluation.forward(job)
        self.place, position, adapters, state = self._restore(sharding.spread(initial, job.mesh))
        self.params, folded = base.under(job.config, job.params, adapters)
        train, self.frozen = lr.partition(folded, max(self.place.step - 1, 0), job.total_steps)
        place, state = self.place, self.tx.init(train) if state is None else state
        self.state = start(train, state, place.step, place.loss, place.weight, job.mesh)
        self.batches, self.times = job.train.iterator(position), job.train.times
        self.log = MetricsLog(directory, self.place.step)
        self.scores: dict[str, float] = {}
        self.reselection = Reselection(job)
        self.schedule = jax.jit(optimizer.schedule(job.config, job.total_steps))
        self.pending: _Pending | None = None
        self.units, self.began = 0, 0.0  # of the batches made, and when, since the last report

    def _restore(self, initial: lr.Adapters) -> tuple[_Place, dict[str, Any] | None, lr.Adapters, Any]:
        if not self.checkpoints.steps:
            return _Place(), None, initial, None
        total, step = self.job.total_steps, self.checkpoints.steps[-1]
        saved = self.checkpoints.record()
        if saved["total_steps"] != total or saved["seed"] != self.job.config.seed:
            raise CheckpointError(
                f"{self.checkpoints.directory} holds a run of {saved['total_steps']} updates with seed {saved['seed']}; the configuration "
                f"asks for {total} with seed {self.job.config.seed}. Choose another workdir, or remove this one."
            )
        if not saved["place"]["step"] == step <= total:
            raise CheckpointError(
                f"{self.checkpoints.directory}: the checkpoint of step {step} says that it is of step {saved['place']['step']} of {total}; "
                f"it was moved there or is damaged. Remove {self.checkpoints.directory / str(step)} to go on from the one before."
            )
        # The checkpoint of a step belongs to the phase that ended with it.
        train, _ = lr.partition(initial, max(step - 1, 0), total)
        restored = self.checkpoints.restore(initial, sharding.spread(self.tx.init(train), self.job.mesh))
        return _Place(**saved["place"]), saved["data"], restored.adapters, restored.optimizer

    def train(self, bar: Bar, termination: Termination) -> None:
        """Makes the updates that are left.

        Raises:
          Stopped: asked to; a checkpoint is saved.
        """
        config, place, total = self.job.config, self.place, self.job.total_steps
        if place.step:
            bar.say(f"going on from step {place.step} of {total}")
        stepper, self.began = None, time.perf_counter()
        while place.step < total and not self._stopped():
            if place.step in self.phases[1:]:
                self._next_phase(bar)
                stepper = None
            if stepper is None:
                stepper = Stepper(self.job, self.tx, lambda width: bar.doing(f"compiling for width {width}"))
            if self.reselection.due(place.step):
                self._report(bar)
                self._check(self.state.ok)
                self.state, self.frozen = self.reselection(self.state, self.frozen, self.params, place.step)
            batch = next(self.batches)
            self.state = stepper(self.state, self.frozen, self.params, batch)
            self._report(bar)
            self.peak = max(self.peak, stepper.peak)
            place.step, self.units = place.step + 1, self.units + self.job.task.count(batch)
            bar.advance(place.step)
            last = place.step == total
            evaluating, saving = (
                due(place.step, config.eval_every, last),
                due(place.step, config.checkpoint_every, last),
            )
            if due(place.step, config.log_every, last):
                self._note()
            if evaluating or saving:
                self._report(bar)
                self._check(self.state.ok)
                score = self._evaluate(bar) if evaluating else None
                self._lap()
                self.units = 0
                self._save(score)
            if termination.asked(place.step) and not last:
                self._stop(bar, saved=evaluating or saving)
        self.log.close()

    def _stop(self, bar: Bar, saved: bool) -> NoReturn:
        if not saved:
            self._report(bar)
            self._check(self.state.ok)
            self._lap()
            self._save(None)
        self.checkpoints.wait()
        self.log.close()
        bar.say(f"stopped by SIGTERM; step {self.place.step} is saved, and the same command goes on from there")
        raise Stopped

    def _stopped(self) -> bool:
        return 0 < self.job.config.patience <= self.place.stale

    def _next_phase(self, bar: Bar) -> None:
        before = self.job.plan.count(self.place.step - 1, self.job.total_steps)
        train, self.frozen = lr.partition(lr.join(self.state.train, self.frozen), self.place.step, self.job.total_steps)
        carried = lr.optim.carry_state(self.tx, self.state.optimizer, train)
        self.state = start(train, carried, self.place.step, self.state.loss, self.state.weight, self.job.mesh)
        after = self.job.plan.count(self.place.step, self.job.total_steps)
        bar.say(f"step {self.place.step}: next phase, {before:,} -> {after:,} trained parameters; compiling again")

    def _check(self, ok: jax.Array) -> None:
        if not bool(ok):
            self.checkpoints.wait()
            good = self.checkpoints.steps
            raise TrainingError(
                f"The loss or its gradient is not finite at step {int(self.state.step) + 1}. "
                + (
                    f"The checkpoint of step {good[-1]} in {self.checkpoints.directory} is good. "
                    if good
                    else "No checkpoint was saved yet. "
                )
                + "Lower config.learning_rate, raise config.warmup, or set config.clip."
            )

    def _note(self) -> None:
        """Sets aside what is to be reported of the update just made, without waiting for it."""
        state, step = self.state, self.place.step
        # The next update takes over the buffers of the state: what is to outlive it is copied, or replaced there.
        self.pending = _Pending(
            step, self.units, jnp.copy(state.ok), state.loss, state.weight, self.schedule(step - 1)
        )  # fmt: skip
        self.state = state._replace(loss=0 * state.loss, weight=0 * state.weight)
        self.units = 0

    def _report(self, bar: Bar) -> None:
        """Reports what was set aside, if anything."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        self._check(pending.ok)
        loss = float(pending.loss) / max(float(pending.weight), 1.0)
        bar.report(pending.step, loss, pending.units * self.times / self._lap())
        values = {"train/loss": loss, "train/learning_rate": float(pending.learning_rate)}
        self.log.write(pending.step, values)

    def _lap(self) -> float:
        """Seconds since the last lap, which are added to the run's."""
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.place.seconds += seconds
        return seconds

    def _evaluate(self, bar: Bar) -> float:
        bar.doing("evaluating")
        adapters = lr.join(self.state.train, self.frozen)
        self.scores = evaluation.evaluate(self.job, self.forward, self.params, adapters, self.job.evaluation)
        self.log.write(self.place.step, {f"eval/{name}": value for name, value in self.scores.items()})
        bar.say(f"step {self.place.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in self.scores.items()))
        merit = evaluation.merit(self.job, self.scores)
        if self.place.best is None or merit > self.place.best:
            self.place.best, self.place.best_step, self.place.stale = merit, self.place.step, 0
        else:
            self.place.stale += 1
        return merit

    def _save(self, score: float | None) -> None:
        place = dataclasses.replace(self.place, loss=float(self.state.loss), weight=float(self.state.weight))
        record = {
            "place": dataclasses.asdict(place), "data": self.batches.state(), "total_steps": self.job.total_steps,
            "seed": self.job.config.seed, "config": configs.to_json(self.job.config),
        }  # fmt: skip
        self.checkpoints.save(
            self.place.step, lr.join(self.state.train, self.frozen), self.state.optimizer, record, score
        )

    def kept(self) -> tuple[int, lr.Adapters]:
        """The step and the adapter that the run keeps, on the unfolded base."""
        adapters = lr.join(self.state.train, self.frozen).replace(folded=False)
        if not self.job.config.best or self.place.best_step in (0, self.place.step):
            return self.place.step, adapters
        return self.place.best_step, self.checkpoints.restore(adapters, step=self.place.best_step).adapters


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps (0: at the end only) happens now."""
    return last or (every > 0 and step % every == 0)


def _finish(job: job.Job, directory: pathlib.Path, session: _Session, kept: tuple[int, lr.Adapters]) -> Result:
    step, adapters = kept
    params, folded = base.under(job.config, job.params, adapters)
    result = session.scores
    if step != session.place.step or not result:
        result = evaluation.evaluate(job, session.forward, params, folded, job.evaluation)
    if job.config.generate:
        match = evaluation.exact_match(job, params, folded, job.evaluation, job.config.generate)
        result = {**result, "exact_match": match}
    test = evaluation.evaluate(job, session.forward, params, folded, job.test) if job.test is not None else {}
    saved = save_adapter(
        directory / "adapter", adapters, job.base, {"config": configs.to_json(job.config), "step": step}
    )
    out = Result(
        scores=result, test=test, step=step, steps=session.place.step, trainable=job.plan.count(0, job.total_steps),
        trainable_end=job.plan.count(job.total_steps - 1, job.total_steps), peak_bytes=session.peak, seconds=session.place.seconds,
        adapter=saved, adapter_bytes=sum(file.stat().st_size for file in saved.iterdir()), workdir=directory,
    )  # fmt: skip
    if leads():
        report.write(job, out)
    return out


__all__ = ["Result", "State", "Stopped", "TrainingError", "run", "train"]
