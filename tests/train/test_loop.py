"""Runs on a tiny model: what they write, how they end, and what an update does."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import lowrank_jax as lr
from lowrank_jax.checkpoint import CheckpointError
from train import config as configs
from train import evaluation, job, loop, metrics_log, optimizer, saved
from train.step import make_update, start


@pytest.fixture(scope="module")
def result(root: pathlib.Path) -> loop.Result:
    return loop.run(tiny.config(root, freeze=0.5))


@pytest.fixture(scope="module")
def loaded(root: pathlib.Path) -> job.Job:
    return job.load(tiny.config(root))


def test_a_run_leaves_everything_it_promises(result):
    rows = metrics_log.read(result.workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [4, 8, 12]
    assert (result.workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((result.workdir / "result.json").read_text())["scores"] == result.scores
    assert "encoder/layers/attention/query/kernel" in (result.workdir / "plan.txt").read_text()
    assert any((result.workdir / "tensorboard").iterdir())
    assert result.steps == 12 and result.peak_bytes > 0
    # 12 stacked sites of two layers: m is 4 x 4, b 4 x 32; the head 32 x 3 + 3.
    sites = 4 * 2
    assert result.trainable_end == sites * 16 + 99
    assert result.trainable == result.trainable_end + sites * 4 * 32


def test_the_kept_adapter_gives_the_reported_scores(result):
    loaded, kept = saved.load(str(result.adapter), saved.config(str(result.adapter)))
    run = evaluation.forward(loaded)
    for params, adapters in ((loaded.params, kept), (lr.merge(loaded.params, kept), None)):
        found = evaluation.evaluate(loaded, run, params, adapters, loaded.evaluation)
        assert found == pytest.approx(result.scores, rel=1e-4)


def test_a_finished_run_started_again_changes_nothing(result, root):
    before = {f: f.read_bytes() for f in (*result.adapter.iterdir(), result.workdir / "metrics.jsonl")}
    again = loop.run(tiny.config(root, freeze=0.5))
    assert again.scores == result.scores and again.step == result.step
    assert {f: f.read_bytes() for f in before} == before


def test_a_workdir_of_another_run_is_refused(result, root):
    longer, other = tiny.config(root, freeze=0.5), tiny.config(root, freeze=0.25)
    longer.steps = 20
    with pytest.raises(CheckpointError, match="12 updates.*20"):
        loop.run(longer)
    with pytest.raises(CheckpointError, match="another plan.*freeze=0.5.*freeze=0.25"):
        loop.run(other)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(root, tmp_path):
    config = tiny.config(root, "lora")
    config.workdir, config.learning_rate, config.clip, config.warmup = str(tmp_path), 1e30, 0.0, 0.5
    config.head.learning_rate = 1e30
    config.checkpoint_every, config.log_every = 1, 1
    with pytest.raises(loop.TrainingError, match=r"not finite at step \d+.*checkpoint of step \d+"):
        loop.run(config)
    steps = sorted(int(d.name) for d in (tmp_path / "checkpoints").iterdir())
    assert steps and steps[-1] < 12


def test_bad_numbers_freeze_the_state(loaded):
    tx = optimizer.make(loaded.config, loaded.plan, loaded.total_steps)
    train, frozen = lr.partition(lr.init(jax.random.key(0), loaded.params, loaded.plan))
    poisoned = jax.tree.map(lambda x: x * jnp.nan, train)
    state = start(poisoned, tx.init(train))
    update = jax.jit(make_update(loaded.config, loaded.model, loaded.task, tx))
    after = update(state, frozen, loaded.params, next(loaded.train.iterator()))
    assert not bool(after.ok) and int(after.step) == 0
    assert all(
        bool(jnp.array_equal(a, b))
        for a, b in zip(jax.tree.leaves(after.optimizer), jax.tree.leaves(state.optimizer), strict=True)
    )


def test_microbatches_make_the_same_update(loaded):
    tx = optax.sgd(1.0)
    train, frozen = lr.partition(lr.init(jax.random.key(0), loaded.params, loaded.plan))
    batch, results = next(loaded.train.iterator()), []
    for accumulate in (1, 4):
        config = loaded.config.copy_and_resolve_references()
        config.accumulate = accumulate
        update = jax.jit(make_update(config, loaded.model, loaded.task, tx))
        results.append(update(start(train, tx.init(train)), frozen, loaded.params, batch))
    for a, b in zip(jax.tree.leaves(results[0].train), jax.tree.leaves(results[1].train), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert float(results[0].weight) == float(results[1].weight) == 8


def test_an_own_learning_rate_scales_the_update_of_its_weights_only():
    params = {"x": {"kernel": jnp.eye(4)}, "head": {"kernel": jnp.eye(4)}}
    config = configs.base()
    config.adapter, config.head = configs.rule("lora", "x", rank=2), configs.rule("full", "head", learning_rate=1e-2)
    config.learning_rate, config.warmup, config.decay, config.clip, config.steps = 1e-3, 0.0, "constant", 0.0, 10
    plan = lr.plan(params, configs.plan_rules(config))
    train, _ = lr.partition(lr.init(jax.random.key(0), params, plan))
    tx = optimizer.make(config, plan, 10)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, train), tx.init(train), train)
    assert float(updates["head/kernel"]["weight"][0, 0]) == pytest.approx(-1e-2, rel=1e-4)
    assert float(updates["x/kernel"]["a"][0, 0]) == pytest.approx(-1e-3, rel=1e-4)


def test_clipping_sees_trained_leaves_and_decay_moves_nothing_that_is_frozen(loaded):
    config = loaded.config.copy_and_resolve_references()
    config.weight_decay, config.clip = 0.5, 1.0
    tx = optimizer.make(config, loaded.plan, loaded.total_steps)
    adapters = lr.init(jax.random.key(0), loaded.params, loaded.plan)
    train, frozen = lr.partition(adapters)
    kept = jax.tree.map(np.array, (frozen, loaded.params))
    update = jax.jit(make_update(config, loaded.model, loaded.task, tx))
    state, batches = start(train, tx.init(train)), loaded.train.iterator()
    for _ in range(3):
        state = update(state, frozen, loaded.params, next(batches))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves((frozen, loaded.params)), strict=True):
        assert np.array_equal(a, b)
    assert {path: set(leaves) for path, leaves in state.train.items()} == {
        path: set(leaves) for path, leaves in train.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "translation"}, "config.task='translation'.*classification"),
        ({"steps": 0}, "config.steps=0.*steps or epochs"),
        ({"accumulate": 3}, "config.accumulate=3.*divisor of batch_size=8"),
        ({"learning_rate": 0.0}, "config.learning_rate"),
        ({"warmup": 1.5}, "config.warmup"),
        ({"adapter": None, "head": None}, "nothing would be trained"),
        ({"adapter.rank": 99}, "rank 99.*between 1 and 32"),
        ({"adapter.method": "lama"}, "config.adapter: Unknown method 'lama'; did you mean 'lamda'"),
        ({"adapter.pattern": ".*/qery"}, "matches no weight.*query"),
        ({"data.name": "tweet"}, "no data set is called 'tweet'.*tweets"),
        ({"data.eval_split": "valid"}, "has no split 'valid'.*test"),
        ({"batch_size": 64}, "batch of 64"),
        ({"mesh.data": 3}, "mesh"),
    ],
)
def test_bad_configurations_get_one_clear_error(root, tmp_path, change, message):
    config: Any = tiny.config(root)
    config.workdir = str(tmp_path / "never")
    for field, value in change.items():
        config.update_from_flattened_dict({field: value}) if value is not None else setattr(config, field, None)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        loop.run(config)
    assert not list((tmp_path / "never").glob("checkpoints/*"))


def test_an_unknown_field_of_a_method_names_the_nearest():
    with pytest.raises(configs.ConfigError, match="lora has no field 'rnak'; did you mean 'rank'"):
        configs.rule("lora", ".*", rnak=3)


def test_configurations_survive_json(root):
    config = tiny.config(root, "lamda_pp")
    assert configs.to_json(configs.from_json(configs.to_json(config))) == configs.to_json(config)
