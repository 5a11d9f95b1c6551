"""A run that is killed at random moments ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from lowrank_jax.models.tensors import open_safetensors
from train import metrics_log

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 60  # eleven epochs of 44 sentences in batches of 8; LaMDA's phase ends at step 30


def _command(root: pathlib.Path, name: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "train.finetune",
        f"--config={HERE / 'tiny_config.py'}:{root}",
        f"--config.workdir={root / name}",
    ]


def _environment(root: pathlib.Path) -> dict[str, str]:
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(root / "xla")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(root / "cache")}
    return os.environ | cache | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def _run(root: pathlib.Path, name: str) -> None:
    done = subprocess.run(_command(root, name), cwd=ROOT, env=_environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def _killed_at(root: pathlib.Path, name: str, step: int, delay: float) -> bool:
    """Starts the run and kills it ``delay`` seconds after it reported ``step``; False if it ended by itself."""
    process = subprocess.Popen(
        _command(root, name), cwd=ROOT, env=_environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        rows = metrics_log.read(root / name / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.005)
    return False


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(tmp_path: pathlib.Path) -> None:
    dice = random.Random()
    _run(tmp_path, "whole")
    # One kill in the first phase, one about the change of phase, one in the last; none needs to hit anything in particular.
    moments = [
        (dice.randint(1, 20), dice.random() / 2),
        (dice.randint(25, 32), dice.random() / 4),
        (dice.randint(36, 55), dice.random() / 8),
    ]
    kills = sum(_killed_at(tmp_path, "killed", step, delay) for step, delay in moments)
    _run(tmp_path, "killed")

    assert kills >= 2, f"the run ended before it could be killed: {moments}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("adapter/adapter.safetensors", "metrics.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs after kills at {moments}"
    results = [json.loads((d / "result.json").read_text()) for d in (whole, killed)]
    assert results[0]["scores"] == results[1]["scores"] and results[0]["step"] == results[1]["step"]
    assert open_safetensors(killed / "adapter")


def test_nothing_but_complete_checkpoints_is_listed(tmp_path: pathlib.Path) -> None:
    # What a killed save leaves behind is a temporary directory; it must not be taken for a checkpoint.
    import jax
    import jax.numpy as jnp

    import lowrank_jax as lr
    from lowrank_jax.checkpoint import Checkpoints, base_reference

    params = {"x": {"kernel": jnp.eye(4)}}
    plan = lr.plan(params, {"x": lr.lora(rank=2)})
    adapters = lr.init(jax.random.key(0), params, plan)
    base = base_reference("eye", params)
    with Checkpoints(tmp_path, base, plan) as checkpoints:
        checkpoints.save(1, adapters, {"count": jnp.zeros(())}, {})
    (tmp_path / "2.orbax-checkpoint-tmp-1234").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp-1234" / "adapters").mkdir()
    with Checkpoints(tmp_path, base, plan) as checkpoints:
        assert checkpoints.steps == [1]
