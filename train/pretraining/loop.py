"""The run: from a configuration to a trained model, a table and a plot. Import `run` to train from a notebook."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np

from lowrank_jax import models
from lowrank_jax.checkpoint import CheckpointError, Store
from lowrank_jax.files import sweep, write_file
from lowrank_jax.hosts import leads, on_host, wait
from train import config as configs
from train import metrics_log, report, sharding
from train.loop import TrainingError, due
from train.metrics_log import Bar, MetricsLog
from train.pretraining.run import Run, load, rate
from train.pretraining.step import Fixed, make_evaluate, make_refresh, make_update, merged, start
from train.processes import Stopped, Termination
from train.step import peak_bytes

_KEYS = ("tokens", "loss_mask")
Evaluate = Callable[..., dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
      loss: of the validation split, nats a token; perplexity: its exponential. steps, tokens: updates made, and tokens learned.
      parameters: of the model. trained: numbers that are updated. optimizer_bytes: of the optimizer's state; stored_bytes: of weights,
        adapters and that state together. peak_bytes: what the compiled update needs on a device; refresh_peak_bytes: the refresh, 0
        without one. seconds: of training, over all sessions. tokens_per_second: between the last two reports.
      model: the directory of the trained model, in Hugging Face's layout. workdir: where everything is.
    """

    loss: float
    perplexity: float
    steps: int
    tokens: int
    parameters: int
    trained: int
    optimizer_bytes: int
    stored_bytes: int
    peak_bytes: int
    refresh_peak_bytes: int
    seconds: float
    tokens_per_second: float
    model: pathlib.Path
    workdir: pathlib.Path


def run(config: ml_collections.ConfigDict) -> Result:
    """Trains what a configuration describes, going on from the newest checkpoint in its workdir if there is one.

    Raises:
      ConfigError, ValueError: see the message. TrainingError: the loss is not finite.
      CheckpointError: the workdir holds another run, or its newest checkpoint is damaged.
      StorageError: the disk of the workdir is full or failing; the same command goes on from the newest checkpoint.
      Stopped: SIGTERM came to one of the processes; a checkpoint is saved.
    """
    return train(load(config))


def train(job: Run) -> Result:
    """`run` on a loaded job."""
    directory = configs.workdir(job.config)
    directory.mkdir(parents=True, exist_ok=True)
    if leads():
        sweep(directory)
    with Store(directory / "checkpoints", job.config.keep) as store:
        session = _Session(job, directory, store)
        if leads():
            write_file(directory / "config.json", [(configs.to_json(job.config) + "\n").encode()])
        with Bar(job.config.steps, session.step, "tokens") as bar, Termination() as termination:
            session.train(bar, termination)
        store.wait()
    return _finish(job, directory, session)


class _Session:
    """The moving parts of one process's share of a run."""

    def __init__(self, job: Run, directory: pathlib.Path, store: Store):
        self.job, self.store = job, store
        self.state, self.fixed = start(job)
        self.tokens, self.seconds, position = 0, 0.0, None
        if store.steps:
            position = self._restore()
        self.batches = job.train.iterator(position)
        self.log = MetricsLog(directory, self.step)
        self.rate, self.loss, self.peak, self.refresh_peak = 0.0, math.nan, 0, 0
        self._counted, self._began = float(self.state.weight), 0.0
        self._evaluate = jax.jit(
            sharding.within(job.mesh, _with_valid(make_evaluate(job))),
            out_shardings=job.mesh and sharding.everywhere(job.mesh),
        )
        self._compiled: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return int(self.state.step)

    def _restore(self) -> Any:
        step, described = self.store.existing(), _described(self.job)
        about = self.store.about(step)
        for field, value in described.items():
            if about["run"].get(field) != value:
                raise CheckpointError(
                    f"{self.store.directory} holds a run with config.{field}={about['run'].get(field)!r}; the configuration asks for "
                    f"{value!r}. Choose another workdir, or remove this one."
                )
        trees = self.store.restore(step, {"state": self.state, "fixed": _arrays(self.fixed)})
        self.state = trees["state"]
        if self.step != step:
            raise CheckpointError(
                f"{self.store.directory}: the checkpoint of step {step} says that it is of step {self.step} of {self.job.config.steps}; "
                f"it was moved there or is damaged. Remove {self.store.directory / str(step)} to go on from the one before."
            )
        held, leaves = trees["fixed"]["held"], trees["fixed"]["adapters"]
        self.fixed = Fixed(held, self.fixed.adapters.replace(sites=leaves["sites"], shared=leaves["shared"]))
        self.tokens, self.seconds = about["tokens"], about["seconds"]
        return about["data"]

    def train(self, bar: Bar, termination: Termination) -> None:
        """Makes the updates that are left.

        Raises:
          Stopped: asked to; a checkpoint is saved.
        """
        config, learner, total, step = self.job.config, self.job.learner, self.job.config.steps, self.step
        if step:
            bar.say(f"going on from step {step} of {total}")
        self._began = time.perf_counter()
        while step < total:
            batch = next(self.batches)
            inputs = sharding.put_batch({name: batch[name] for name in _KEYS}, self.job.mesh)
            if learner.refresh is not None and step % learner.every == 0 and (step or learner.first):
                self.state, self.fixed = self._refreshing(bar, inputs)(self.state, self.fixed, inputs)
            self.state = self._updating(bar, inputs)(self.state, self.fixed, inputs)
            step += 1
            bar.advance(step)
            last = step == total
            if due(step, config.log_every, last):
                self._check()
                self.rate = self._lap()
                self._report(bar, step)
            evaluating, saving = due(step, config.eval_every, last), due(step, config.checkpoint_every, last)
            if evaluating or saving:
                self._check()
                if evaluating:
                    self._validate(bar, step)
                self._lap()
                if saving:
                    self._save(step)
            if termination.asked(step) and not last:
                self._stop(bar, step, saved=saving)
        self.log.close()

    def _stop(self, bar: Bar, step: int, saved: bool) -> NoReturn:
        if not saved:
            self._check()
            self._lap()
            self._save(step)
        self.store.wait()
        self.log.close()
        bar.say(f"stopped by SIGTERM; step {step} is saved, and the same command goes on from there")
        raise Stopped

    def _lap(self) -> float:
        """Adds up time and tokens since the last call; tokens a second meanwhile."""
        now, weight = time.perf_counter(), float(self.state.weight)
        elapsed, units = now - self._began, round(weight - self._counted)
        self.seconds, self.tokens = self.seconds + elapsed, self.tokens + units
        self._began, self._counted = now, weight
        return units / max(elapsed, 1e-9)

    def _updating(self, bar: Bar, inputs: Any) -> Any:
        if "update" not in self._compiled:
            bar.doing("compiling")
            where = None if self.job.mesh is None else jax.tree.map(lambda x: x.sharding, self.state)
            jitted = jax.jit(
                sharding.within(self.job.mesh, make_update(self.job)), donate_argnums=0, out_shardings=where
            )
            self._compiled["update"] = jitted.lower(self.state, self.fixed, inputs).compile()
            self.peak = peak_bytes(self._compiled["update"])
            wait("compilation of an update")
        return self._compiled["update"]

    def _refreshing(self, bar: Bar, inputs: Any) -> Any:
        if "refresh" not in self._compiled:
            bar.doing("compiling the refresh")
            here = (self.state, self.fixed)
            where = None if self.job.mesh is None else jax.tree.map(lambda x: x.sharding, here)
            jitted = jax.jit(
                sharding.within(self.job.mesh, make_refresh(self.job)), donate_argnums=(0, 1), out_shardings=where
            )
            self._compiled["refresh"] = jitted.lower(*here, inputs).compile()
            self.refresh_peak = peak_bytes(self._compiled["refresh"])
            wait("compilation of a refresh")
        return self._compiled["refresh"]

    def _check(self) -> None:
        if not bool(self.state.ok):
            self.store.wait()
            good = self.store.steps
            kept = f"The checkpoint of step {good[-1]} in {self.store.directory} is good. " if good else ""
            raise TrainingError(
                f"The loss or its gradient is not finite at step {self.step + 1}. {kept}Lower config.learning_rate, raise "
                "config.warmup, or set config.clip."
            )

    def _report(self, bar: Bar, step: int) -> None:
        loss = float(self.state.loss) / max(float(self.state.weight), 1.0)
        self.state = self.state._replace(loss=0 * self.state.loss, weight=0 * self.state.weight)
        self._counted = 0.0
        bar.report(step, loss, self.rate)
        self.log.write(step, {"train/loss": loss, "train/learning_rate": float(rate(self.job)(step - 1))})

    def _validate(self, bar: Bar, step: int) -> None:
        bar.doing("evaluating")
        total = count = 0.0
        for batch in self.job.evaluation.evaluation_batches():
            inputs = sharding.put_batch({name: batch[name] for name in (*_KEYS, "valid")}, self.job.mesh)
            sums = jax.tree.map(np.asarray, self._evaluate(self.state, self.fixed, inputs))
            total += float(sums["loss"][sums["valid"]].sum(dtype=np.float64))
            count += float(sums["tokens"][sums["valid"]].sum(dtype=np.float64))
        self.loss = total / max(count, 1.0)
        self.log.write(step, {"eval/loss": self.loss, "eval/perplexity": _perplexity(self.loss)})
        bar.say(f"step {step}: validation loss {self.loss:.4f}  perplexity {_perplexity(self.loss):.2f}")

    def _save(self, step: int) -> None:
        about = {
            "run": _described(self.job),
            "data": self.batches.state(),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        self.store.save(step, {"state": self.state, "fixed": _arrays(self.fixed)}, about)


def _described(job: Run) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    config = json.loads(configs.to_json(job.config))
    return {name: config[name] for name in ("model", "method", "layerwise", "steps", "seed", "batch_size")} | {
        "tokenizer": job.tokenizer.fingerprint
    }


def _arrays(fixed: Fixed) -> dict[str, Any]:
    return {"held": fixed.held, "adapters": {"sites": fixed.adapters.sites, "shared": fixed.adapters.shared}}


def _with_valid(evaluate: Evaluate) -> Evaluate:
    """Every process needs the sums of all rows, and which of them are rows of the data."""
    return lambda state, fixed, batch: evaluate(state, fixed, batch) | {"valid": batch["valid"]}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _finish(job: Run, directory: pathlib.Path, session: _Session) -> Result:
    if math.isnan(session.loss):  # a finished run that was started again
        with Bar(job.config.steps, session.step, "tokens") as bar:
            session._validate(bar, session.step)
    state, fixed = session.state, session.fixed
    folder, whole = directory / "model", jax.tree.map(on_host, merged(job, state, fixed))
    if leads():
        models.save(whole, job.model_config, folder, overwrite=True)
        job.tokenizer.save(folder)
    wait("model")
    out = Result(
        loss=session.loss, perplexity=_perplexity(session.loss), steps=session.step, tokens=session.tokens,
        parameters=sum(x.size for x in jax.tree.leaves(job.shapes)),
        trained=sum(x.size for x in jax.tree.leaves((state.weights, state.factors))),
        optimizer_bytes=_bytes(state.optimizer), stored_bytes=_bytes((state, fixed)), peak_bytes=session.peak,
        refresh_peak_bytes=session.refresh_peak, seconds=session.seconds, tokens_per_second=session.rate, model=folder, workdir=directory,
    )  # fmt: skip
    if leads():
        _report(job, out)
    return out


def _report(job: Run, out: Result) -> None:
    directory = out.workdir
    plain = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(out).items()}
    write_file(directory / "result.json", [(json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()])
    picture = report.plot(metrics_log.read(directory / "metrics.jsonl"), directory / "curves.png", job.config.name)
    report.show(job.config.name, _rows(out, picture))


def _rows(result: Result, picture: pathlib.Path) -> list[tuple[str, str]]:
    from lowrank_jax.plan_table import human_bytes

    rows = [
        ("validation loss", f"{result.loss:.4f}"),
        ("perplexity", f"{result.perplexity:.2f}"),
        ("tokens learned", f"{result.tokens:,}"),
        ("parameters", f"{result.parameters:,}"),
        ("numbers that are updated", f"{result.trained:,}"),
        ("optimizer state", human_bytes(result.optimizer_bytes)),
        ("weights, adapters and state", human_bytes(result.stored_bytes)),
        ("peak memory of an update", human_bytes(result.peak_bytes) if result.peak_bytes else "no update was made"),
    ]
    if result.refresh_peak_bytes:
        rows.append(("peak memory of a refresh", human_bytes(result.refresh_peak_bytes)))
    return [
        *rows,
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s"),
        ("time", f"{int(result.seconds) // 60} min {int(result.seconds) % 60} s"),
        ("model", str(report.near(result.model))),
        ("curves", str(report.near(picture))),
    ]
