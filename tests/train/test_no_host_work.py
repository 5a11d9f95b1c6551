"""Nothing the host does holds a step up: no hidden transfer, no copy, no compilation, no waiting for numbers or for batches."""

from __future__ import annotations

import pathlib
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from train import loop, metrics_log, step
from train.data import Loader
from train.step import Stepper

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with every program that XLA compiles."""
    found: list[str] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == COMPILED:
            found.append(str(about.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def _config(root: pathlib.Path, workdir: pathlib.Path, method: str, **fields: Any) -> Any:
    """A run of 16 updates, all batches of one width, with nothing beside the updates."""
    config = tiny.config(root, method, **fields)
    config.workdir, config.steps, config.data.max_length = str(workdir), 16, 8
    config.eval_every, config.checkpoint_every, config.log_every = 0, 0, 16
    return config


@pytest.mark.parametrize("devices", [1, 2])
def test_a_warm_step_transfers_copies_and_compiles_nothing(root, tmp_path, monkeypatch, compilations, devices):
    config = _config(root, tmp_path, "lamda", freeze=0.5)
    config.mesh.data, config.accumulate = devices, 2
    config.eval_every, config.checkpoint_every, config.log_every = 3, 4, 2
    after, update = [], Stepper.__call__

    def guarded(self, state, frozen, params, batch):
        warm = bool(self.compiled)
        with jax.transfer_guard("disallow" if warm else "allow"), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # some donated buffers were not usable
            out = update(self, state, frozen, params, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "a buffer was not donated"
        after.append(len(compilations))
        return out

    monkeypatch.setattr(Stepper, "__call__", guarded)
    result = loop.run(config)
    assert result.steps == 16 and result.trainable > result.trainable_end
    # By the seventh update there have been reports, evaluations and a checkpoint; the eighth ends the first phase.
    assert after[7] == after[6], compilations[after[6] :]
    assert after[8] == after[7] + 1, compilations[after[7] :]
    assert after[15] == after[8], compilations[after[8] :]


def test_the_next_update_is_asked_for_before_numbers_of_the_last_are_read(root, tmp_path, monkeypatch):
    config = _config(root, tmp_path, "lora")
    config.log_every = 1
    running, update, make = [], Stepper.__call__, step.make_update

    def watched(self, state, *rest):
        running.append(not state.step.is_ready())
        return update(self, state, *rest)

    def slow(*args):
        plain = make(*args)

        def run(state, *rest):
            busy = jax.lax.fori_loop(0, 5_000_000, lambda i, x: jnp.sin(x), state.loss)
            return plain(state._replace(loss=state.loss + 0 * busy), *rest)

        return run

    monkeypatch.setattr(Stepper, "__call__", watched)
    monkeypatch.setattr(step, "make_update", slow)
    loop.run(config)
    # A busy machine may be late itself now and then; a loop that waits for its numbers always is.
    assert sum(running) > len(running) / 2
    rows = metrics_log.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 17))


def test_batches_are_made_while_updates_run(root, tmp_path, monkeypatch):
    config = _config(root, tmp_path, "lora")
    making, running, began = 0.05, 0.06, []
    threads, update, batch = set(), Stepper.__call__, Loader.training_batch

    def slow_batch(*args):
        threads.add(threading.current_thread())
        time.sleep(making)
        return batch(*args)

    def slow_update(self, *args):
        out = update(self, *args)
        began.append(time.perf_counter())
        time.sleep(running)
        return out

    monkeypatch.setattr(Loader, "training_batch", slow_batch)
    monkeypatch.setattr(Stepper, "__call__", slow_update)
    loop.run(config)
    assert threading.main_thread() not in threads
    # The first update compiled, and eight batches may have been ready by then: later ones take what the slower takes, not the sum.
    apart = np.median(np.diff(began[9:]))
    assert running <= apart < running + making / 2
