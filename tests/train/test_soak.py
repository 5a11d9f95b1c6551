"""A run through one fault after another ends with the same bits as one that nothing happened to."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lowrank_jax.checkpoint import CheckpointError
from lowrank_jax.files import StorageError
from train import evaluation, job, loop, metrics_log
from train.data import patience
from train.step import Stepper

STEPS = 40


@pytest.fixture(scope="module")
def loaded(root: pathlib.Path) -> job.Job:
    config = tiny.config(root, "lora", rank=2)
    config.steps, config.log_every, config.checkpoint_every, config.eval_every, config.keep = STEPS, 2, 4, 20, 3
    config.data.max_length = 8  # one width, one compilation
    config.warmup = 0.1
    return job.load(config)


class Soak:
    """Sessions of one run. They share what is compiled, as a cache on a disk would; ``at`` is called before an update."""

    def __init__(self, loaded: job.Job, patch: pytest.MonkeyPatch):
        compiled: dict[Any, Any] = {}
        soak, forward = self, evaluation.forward(loaded)

        class Shared(Stepper):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                self.compiled = compiled

            def __call__(self, state: Any, *rest: Any) -> Any:
                return super().__call__(soak.at(int(state.step) + 1, state), *rest)

        self.job, self.at = loaded, lambda step, state: state
        patch.setattr(loop, "Stepper", Shared)
        patch.setattr(evaluation, "forward", lambda job: forward)

    def run(self, workdir: pathlib.Path, at: Callable[[int, Any], Any] = lambda step, state: state) -> loop.Result:
        """One session; ``at(step, state)`` may do something before the update that makes a step, and gives the state to update."""
        self.at = at
        self.job.config.workdir = str(workdir)
        return loop.train(self.job)


@contextlib.contextmanager
def _room(size: int | None) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: the system's own errors, in every layer down to TensorStore's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _fills(workdir: pathlib.Path, when: int, spare: int) -> Callable[[int, Any], Any]:
    """The disk is full from an update on: there is room for ``spare`` bytes more than metrics.jsonl has."""

    def at(step: int, state: Any) -> Any:
        if step == when:
            _saved(workdir, 4)
            size = (workdir / "metrics.jsonl").stat().st_size + spare
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return state

    return at


def _steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(d.name) for d in (workdir / "checkpoints").iterdir() if d.name.isdigit())


def _saved(workdir: pathlib.Path, step: int) -> None:
    """Waits until what is saved in the background is on the disk."""
    while step not in _steps(workdir):
        time.sleep(0.01)


def _last_row(workdir: pathlib.Path) -> int:
    return metrics_log.read(workdir / "metrics.jsonl")[-1]["step"]


def _follow(error: BaseException) -> None:
    """Does what the message of a refusal says."""
    found = re.search(r"Remove (\S+) to go on", str(error))
    assert found, str(error)
    shutil.rmtree(found[1])


def _nan(when: int) -> Callable[[int, Any], Any]:
    poison = lambda tree: jax.tree.map(lambda x: x * jnp.nan, tree)  # noqa: E731
    return lambda step, state: state._replace(train=poison(state.train)) if step == when else state


class _Flaky(np.memmap):
    """Tokens on a disk that fails now and then."""

    failures = 0

    def __getitem__(self, index: Any) -> Any:
        if _Flaky.failures:
            _Flaky.failures -= 1
            raise OSError(5, "Input/output error")
        return super().__getitem__(index)


def _no_leftovers(workdir: pathlib.Path) -> None:
    names = [file.name for file in (*workdir.iterdir(), *(workdir / "checkpoints").iterdir())]
    assert not [name for name in names if name.startswith(".") or "tmp" in name], names


def test_a_run_through_every_fault_ends_like_one_without(loaded, tmp_path, monkeypatch, capsys, caplog):
    # capsys keeps what is printed in memory: a file would have no room either.
    monkeypatch.setattr(patience, "SECONDS", 0.0)
    soak, run = Soak(loaded, monkeypatch), tmp_path / "disturbed"
    whole = soak.run(tmp_path / "whole")

    # No room for a line of metrics: half of it is written.
    with (
        _room(None),
        pytest.raises(StorageError, match=r"metrics.jsonl: could not be written.*Make room; the same command goes on"),
    ):
        soak.run(run, _fills(run, 6, 10))
    assert (run / "metrics.jsonl").read_bytes()[-1:] != b"\n" and _steps(run) == [4]

    # No room for a checkpoint. The one before stays good, and nothing else is taken for one.
    with (
        _room(None),
        pytest.raises(StorageError, match=r"checkpoints: a checkpoint: could not.*complete one is of step 4\. Make"),
    ):
        soak.run(run, _fills(run, 7, 3000))
    assert 8 not in loop.Checkpoints(run / "checkpoints", loaded.base, loaded.plan).steps

    # NaN: the run stops, and what it names as good is.
    with pytest.raises(loop.TrainingError, match=r"not finite at step 14\..*checkpoint of step 12 in"):
        soak.run(run, _nan(14))
    assert _last_row(run) == 12

    # The newest checkpoint is cut short, file by file.
    newest = run / "checkpoints" / "12"
    for file in [f for f in newest.rglob("*") if f.is_file()]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="checkpoint of step 12 is damaged.*go on from step 8") as error:
        soak.run(run)
    _follow(error.value)

    # A checkpoint from the future: of a later step than there will be, and of a later format.
    shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / "999")
    with pytest.raises(CheckpointError, match="checkpoint of step 999 says that it is of step 8 of 40") as error:
        soak.run(run)
    _follow(error.value)
    about = next(f for f in (run / "checkpoints" / "8").iterdir() if f.is_file() and b'"checksums"' in f.read_bytes())
    kept = about.read_text()
    content = json.loads(kept)
    content["custom_metadata"]["format"] = 2
    about.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"step 8: format 2; this version reads 1\. A later version.*update"):
        soak.run(run)
    about.write_text(kept)

    # Writers were killed and left their temporary files; then the data cannot be read for a moment, and the clocks jump.
    for name in (".metrics.jsonl.abcdefgh.part", ".result.json.abc_efgh.part"):
        (run / name).write_text('{"step": 3, "train/loss"')
    (run / ".adapter.01234567.part" / "new").mkdir(parents=True)
    (run / "checkpoints" / "20.orbax-checkpoint-tmp" / "adapters").mkdir(parents=True)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "train/lo')
    table = loaded.train.table
    monkeypatch.setattr(soak, "job", dataclasses.replace(
        loaded, train=dataclasses.replace(loaded.train, table=table._replace(ids=table.ids.view(_Flaky)))))  # fmt: skip
    ahead = {12: -600.0, 16: 300.0, 23: 86400.0, 28: -86400.0}
    real = {name: getattr(time, name) for name in ("time", "perf_counter", "monotonic")}

    def jump(step: int, state: Any) -> Any:
        if step == 10:
            _Flaky.failures = 1
        if step in ahead:
            if (
                ahead[step] > 0
            ):  # Orbax gives up on a save during which the clock is set forward by more than twenty minutes
                _saved(run, 20)
            for name, clock in real.items():
                monkeypatch.setattr(time, name, lambda clock=clock, by=ahead[step]: clock() + by)
        if step == 20:
            for name, clock in real.items():
                monkeypatch.setattr(time, name, itertools.repeat(clock()).__next__)  # stands still
        return _nan(33)(step, state)

    monkeypatch.setenv("FORCE_COLOR", "1")  # the bar is live
    with caplog.at_level(logging.WARNING), pytest.raises(loop.TrainingError, match="not finite at step 33"):
        soak.run(run, jump)
    monkeypatch.delenv("FORCE_COLOR")
    for name, clock in real.items():
        monkeypatch.setattr(time, name, clock)
    assert _Flaky.failures == 0 and "could not be read ([Errno 5] Input/output error); attempt 1 of 3" in caplog.text
    _no_leftovers(run)

    # No room for the adapter at the end of training: nothing half-written stands in its place.
    save = loop.save_adapter

    def crowded(*args: Any) -> Any:
        with _room(100):
            return save(*args)

    monkeypatch.setattr(loop, "save_adapter", crowded)
    with pytest.raises(StorageError, match="adapter.*could not be written"):
        soak.run(run)
    assert not (run / "adapter").exists() and _steps(run)[-1] == STEPS
    monkeypatch.setattr(loop, "save_adapter", save)

    result = soak.run(run)
    assert result.scores == whole.scores and result.seconds >= 0
    for name in ("adapter/adapter.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert _steps(run) == _steps(tmp_path / "whole")
    _no_leftovers(run)
