"""A run through one fault after another ends with the same bits as one that nothing happened to.

`--soak-steps=5000` makes as many updates as an hour of the MiniLM experiment on two cores has; the faults then come round again and again,
in another order each time.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny

from lowrank_jax.checkpoint import CheckpointError
from lowrank_jax.files import StorageError
from train import evaluation, job, loop, metrics_log
from train.data import Loader
from train.step import State, Stepper

SAVED = 4  # updates from one checkpoint to the next
Action = Callable[[State], State | None]


class Run:
    """Sessions of one run, in one process. They share what is compiled, as a cache on a disk would."""

    def __init__(self, loaded: job.Job, workdir: pathlib.Path, patch: pytest.MonkeyPatch):
        self.job, self.workdir, self.patch = loaded, workdir, patch
        self.checkpoints, self.metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
        self.compiled: dict[Any, Any] = {}
        self.forward = evaluation.forward(loaded)

    def go(self, at: dict[int, Action] | None = None) -> loop.Result:
        """One session, from the newest checkpoint. ``at[step]`` is called before the update that makes a step; it may change the state."""
        actions, plain, forward = at or {}, Stepper.__call__, self.forward

        def update(stepper: Stepper, state: State, *rest: Any) -> State:
            stepper.compiled = self.compiled
            changed = actions.get(int(state.step) + 1, lambda state: None)(state)
            return plain(stepper, state if changed is None else changed, *rest)

        self.job.config.workdir = str(self.workdir)
        with self.patch.context() as patch:
            patch.setattr(Stepper, "__call__", update)
            patch.setattr(evaluation, "forward", lambda job: forward)
            return loop.train(self.job)

    def stop(self, step: int, at: dict[int, Action] | None = None) -> None:
        """One session that is interrupted before the update that makes a step."""
        with pytest.raises(KeyboardInterrupt):
            self.go({**(at or {}), step: _interrupt})

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints on the disk."""
        return sorted(int(d.name) for d in self.checkpoints.iterdir() if d.name.isdigit())

    def newest(self) -> pathlib.Path:
        return self.checkpoints / str(self.steps[-1])


def _interrupt(state: State) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _room(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: the system's own errors, in every layer down to TensorStore's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _obey(refusal: CheckpointError) -> None:
    """Does what the message says."""
    found = re.search(r"Remove (\S+) to go on", str(refusal))
    assert found, str(refusal)
    shutil.rmtree(found[1])


# The faults: each strikes at about a step, two updates after a checkpoint, and leaves a run that can go on.


def full_disk_at_a_line_of_metrics(run: Run, step: int) -> None:
    write = loop.MetricsLog.write

    def crowded(log: loop.MetricsLog, *args: Any) -> None:
        with _room(run.metrics.stat().st_size + 10):
            write(log, *args)

    with run.patch.context() as patch:
        strike = {step: lambda state: patch.setattr(loop.MetricsLog, "write", crowded)}
        with pytest.raises(
            StorageError, match=r"metrics.jsonl: could not be written.*Make room; the same command goes on"
        ):
            run.go(strike)


def full_disk_at_a_checkpoint(run: Run, step: int) -> None:
    save = loop.Checkpoints.save

    def crowded(checkpoints: loop.Checkpoints, *args: Any) -> None:
        checkpoints.wait()  # the one before still has room
        with _room(3000):
            save(checkpoints, *args)
            checkpoints.wait()

    with run.patch.context() as patch:
        strike = {step: lambda state: patch.setattr(loop.Checkpoints, "save", crowded)}
        match = rf"checkpoint could not be written \(File too large\).*goes on from.*of step {step - 2}\."
        with pytest.raises(StorageError, match=match):
            run.go(strike)
    assert run.steps[-1] == step - 2


def numbers_that_are_not_finite(run: Run, step: int) -> None:
    strike = {step: lambda state: state._replace(train=jax.tree.map(lambda x: x * jnp.nan, state.train))}
    with pytest.raises(
        loop.TrainingError, match=rf"not finite at step {step}\..*checkpoint of step {step - 2} in .* is good"
    ):
        run.go(strike)
    assert metrics_log.read(run.metrics)[-1]["step"] == step - 2


def checkpoint_cut_short(run: Run, step: int) -> None:
    run.stop(step)
    for file in [f for f in run.newest().rglob("*") if f.is_file()]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"of step {step - 2} is damaged") as refused:
        run.go()
    _obey(refused.value)


def checkpoint_of_a_later_step_than_there_will_be(run: Run, step: int) -> None:
    run.stop(step)
    total = run.job.total_steps
    shutil.copytree(run.newest(), run.checkpoints / str(total + 1))
    with pytest.raises(
        CheckpointError, match=f"of step {total + 1} says that it is of step {step - 2} of {total}"
    ) as refused:
        run.go()
    _obey(refused.value)


def checkpoint_of_a_later_version(run: Run, step: int) -> None:
    run.stop(step)
    about = next(f for f in run.newest().iterdir() if f.is_file() and b'"checksums"' in f.read_bytes())
    kept = about.read_text()
    content = json.loads(kept)
    content["custom_metadata"]["format"] = 2
    about.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=rf"step {step - 2}: format 2; this version reads 1\. A later version.*update"
    ):
        run.go()
    about.write_text(kept)


def writers_that_were_killed(run: Run, step: int) -> None:
    run.stop(step)
    for name in (".metrics.jsonl.abcdefgh.part", ".result.json.abc_efgh.part"):
        (run.workdir / name).write_text('{"step": 3, "train/loss"')
    (run.workdir / ".adapter.01234567.part" / "new").mkdir(parents=True)
    (run.checkpoints / f"{step + 2}.orbax-checkpoint-tmp" / "adapters").mkdir(parents=True)
    with run.metrics.open("a") as stream:
        stream.write('{"step": 8, "train/lo')


def data_that_cannot_be_read_once(run: Run, step: int) -> None:
    make = Loader.training_batch

    def failing(loader: Loader, index: int) -> Any:
        if index == step:
            raise OSError(5, "Input/output error")
        return make(loader, index)

    with run.patch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(Loader, "training_batch", failing)
        run.go()
    assert run.steps[-1] <= step


def clocks_that_jump(run: Run, step: int) -> None:
    clock, begun = time.time, run.checkpoints / str(step - 2)

    def off_by(seconds: float) -> None:
        patch.setattr(time, "time", lambda: clock() + seconds)

    def forward(state: State) -> None:
        while not begun.exists():  # a save of which the clock says that it takes more than twenty minutes is given up
            time.sleep(0.01)
        off_by(86400.0)

    with run.patch.context() as patch:
        run.stop(
            step + 4, {step - 1: lambda state: off_by(-600.0), step: forward, step + 3: lambda state: off_by(-86400.0)}
        )
    assert run.steps[-1] == step + 2


FAULTS = (
    full_disk_at_a_line_of_metrics,
    full_disk_at_a_checkpoint,
    numbers_that_are_not_finite,
    checkpoint_cut_short,
    checkpoint_of_a_later_step_than_there_will_be,
    checkpoint_of_a_later_version,
    writers_that_were_killed,
    data_that_cannot_be_read_once,
    clocks_that_jump,
)


def _schedule(total: int) -> Iterator[tuple[Callable[[Run, int], None], int]]:
    """The faults and where they strike: all in turn, then in other orders, at most 200 of them."""
    dice, apart = random.Random(0), SAVED * max(1, total // (200 * SAVED))
    steps = iter(range(2 * SAVED + 2, total - SAVED, apart))
    order = list(FAULTS)
    while True:
        for fault in order:
            step = next(steps, None)
            if step is None:
                return
            yield fault, step
        dice.shuffle(order)


@pytest.fixture
def loaded(root: pathlib.Path, request: pytest.FixtureRequest) -> job.Job:
    config = tiny.config(root, "lora", rank=2)
    config.steps, config.warmup = request.config.getoption("soak_steps"), 0.1
    config.log_every, config.checkpoint_every, config.eval_every, config.keep = 2, SAVED, config.steps // 2, 3
    config.data.max_length = 8  # one width, one compilation
    return job.load(config)


def test_a_run_through_every_fault_ends_like_one_without(loaded, tmp_path, monkeypatch, capsys):
    # capsys keeps what is printed in memory: a file would have no room either.
    run, undisturbed = Run(loaded, tmp_path / "run", monkeypatch), Run(loaded, tmp_path / "undisturbed", monkeypatch)
    met = set()
    for fault, step in _schedule(loaded.total_steps):
        fault(run, step)
        met.add(fault)
    assert met == set(FAULTS)

    # No room for the adapter at the end of training: nothing half-written stands in its place.
    save = loop.save_adapter
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="adapter.*could not be written"):
        patch.setattr(loop, "save_adapter", _room(100)(save))
        run.go()
    assert not (run.workdir / "adapter").exists()

    result, expected = run.go(), undisturbed.go()
    assert result.scores == expected.scores and result.seconds > 0
    for name in ("adapter/adapter.safetensors", "metrics.jsonl"):
        assert (run.workdir / name).read_bytes() == (undisturbed.workdir / name).read_bytes(), name
    assert run.steps == undisturbed.steps
    names = [file.name for file in (*run.workdir.iterdir(), *run.checkpoints.iterdir())]
    assert not [name for name in names if name.startswith(".") or "tmp" in name], names
