"""Pre-training: every method learns, what is written is what was trained, and a run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.pretrain import RECIPES, get_config
from lowrank_jax import models
from lowrank_jax.checkpoint import CheckpointError
from lowrank_jax.models.tokenizer import load_tokenizer
from lowrank_jax.sites import flatten
from train.config import ConfigError
from train.pretraining import loop
from train.pretraining.config import base, method
from train.pretraining.methods import is_adapted
from train.pretraining.run import load, rate
from train.pretraining.step import make_refresh, make_update, merged, parameters, start

STEPS = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: Any) -> pathlib.Path:
    """Sentences in which a word follows from the one before."""
    dice = random.Random(0)
    words = [f"w{n}" for n in range(20)]
    lines = []
    for _ in range(400):
        at = dice.randrange(20)
        line = []
        for _ in range(12):
            line.append(words[at])
            at = (3 * at + dice.choice((1, 2))) % 20
        lines.append(" ".join(line))
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def small(corpus: pathlib.Path, workdir: pathlib.Path, recipe: str) -> ConfigDict:
    config = get_config(recipe)
    config.data.name, config.data.directory, config.workdir = "text", str(corpus), str(workdir)
    config.data.max_length, config.tokenizer.vocab_size = 16, 300
    config.model.hidden_size, config.model.intermediate_size, config.model.layers, config.model.heads = 16, 24, 3, 2
    config.steps, config.batch_size, config.eval_batch_size = STEPS, 8, 8
    config.eval_every, config.checkpoint_every, config.log_every = 0, 10, 4
    config.learning_rate = 3e-2
    for field, value in {"rank": 4, "refresh_every": 8, "density": 0.25, "period": 4, "restarts": 3}.items():
        if field in config.method:
            config.method[field] = value
    return config


LAYERWISE = ["adamw_8bit", "galore_8bit", "frugal"]  # the others below


@pytest.mark.parametrize(
    ("recipe", "layerwise"), [(name, False) for name in RECIPES] + [(name, True) for name in LAYERWISE]
)
def test_every_method_learns_and_writes_the_model_it_trained(recipe, layerwise, corpus, tmp_path):
    config = small(corpus, tmp_path / "run", recipe)
    config.layerwise = layerwise
    job = load(config)
    result = loop.train(job)
    assert result.steps == STEPS and result.loss < 5.0  # 5.6 at the start; the words alone give 3.0
    read = models.load(result.model, scan_layers=True)
    tokenizer = load_tokenizer(result.model)
    assert tokenizer.fingerprint == job.tokenizer.fingerprint
    rows = next(iter(job.evaluation.evaluation_batches()))
    logits = read.model.apply({"params": read.params}, jnp.asarray(rows["tokens"]))
    assert np.isfinite(np.asarray(logits)).all()
    total = count = 0.0
    for batch in job.evaluation.evaluation_batches():
        logits = jax.nn.log_softmax(read.model.apply({"params": read.params}, jnp.asarray(batch["tokens"])))
        nll = -np.take_along_axis(np.asarray(logits)[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
        learned = batch["loss_mask"][:, 1:] * batch["valid"][:, None]
        total, count = total + float((nll * learned).sum()), count + float(learned.sum())
    assert total / count == pytest.approx(result.loss, abs=2e-4)  # what is written is what was validated
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("recipe", "layerwise"), [("galore_8bit", False), ("galore_8bit", True), ("dual_galore", False), ("relora", False)]
)
def test_a_run_goes_on_where_it_stopped(recipe, layerwise, corpus, tmp_path, monkeypatch):
    first, config = (small(corpus, tmp_path / name, recipe) for name in ("whole", "halves"))
    first.layerwise = config.layerwise = layerwise
    whole = loop.run(first)

    class Stopped(Exception):
        pass

    def stop(self: Any, bar: Any, step: int) -> None:
        if step == 16:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "_report", stop)
        with pytest.raises(Stopped):
            loop.run(config)
    assert (tmp_path / "halves" / "checkpoints" / "10").is_dir()
    resumed = loop.run(config)
    files = [json.loads((r.workdir / "result.json").read_text()) for r in (whole, resumed)]
    assert files[0]["loss"] == files[1]["loss"]
    first, second = (models.load(r.model, scan_layers=True).params for r in (whole, resumed))
    for path, leaf in flatten(first).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(second)[path]).tobytes(), path


def test_a_workdir_of_another_run_is_refused(corpus, tmp_path):
    config = small(corpus, tmp_path / "run", "adamw")
    config.steps, config.checkpoint_every = 2, 1
    loop.run(config)
    other = small(corpus, tmp_path / "run", "galore")
    other.steps = 2
    with pytest.raises(CheckpointError, match="holds a run with config.method="):
        loop.run(other)
    (tmp_path / "run" / "checkpoints" / "2").rename(tmp_path / "run" / "checkpoints" / "9")
    with pytest.raises(
        CheckpointError, match="checkpoint of step 9 says that it is of step 2 of 2; .*Remove .*/9 to go on"
    ):
        loop.run(config)


def batch_of(batches):
    return {name: jnp.asarray(value) for name, value in next(batches).items() if name in ("tokens", "loss_mask")}


@pytest.mark.parametrize("recipe", ["adamw", "galore"])
def test_updates_layer_by_layer_are_those_of_all_layers_at_once(recipe, corpus, tmp_path):
    """With decay and a rate that changes; nothing is drawn at random, which layers share."""
    config = small(corpus, tmp_path, recipe)
    config.eps, config.weight_decay = 1e-3, 0.1
    config.method.update({"svd": "exact"} if recipe == "galore" else {})
    ends = []
    for layerwise in (False, True):
        config.layerwise = layerwise
        job = load(config)
        (state, fixed), batches, update = start(job), job.train.iterator(), jax.jit(make_update(job))
        for _ in range(10):
            state = update(state, fixed, batch_of(batches))
        assert (int(state.step), bool(state.ok)) == (10, True)
        ends.append((float(state.loss), float(state.weight), state.weights))
    (loss, weight, one), (other_loss, other_weight, other) = ends
    assert weight == other_weight and loss == pytest.approx(other_loss, rel=1e-5)
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, other[path], atol=5e-4, err_msg=path)


def test_layer_by_layer_no_gradient_of_the_model_is_held(corpus, tmp_path):
    config = small(corpus, tmp_path, "galore")
    config.model.hidden_size, config.model.intermediate_size, config.model.layers, config.model.remat = (
        64,
        96,
        12,
        "full",
    )
    config.batch_size = 1
    temporaries = []
    for layerwise in (False, True):
        config.layerwise = layerwise
        job = load(config)
        state, fixed = start(job)
        update = jax.jit(make_update(job), donate_argnums=0).lower(state, fixed, batch_of(job.train.iterator()))
        temporaries.append(update.compile().memory_analysis().temp_size_in_bytes)
    weights = sum(x.nbytes for x in jax.tree.leaves(state.weights))
    assert temporaries[0] > weights and temporaries[1] < 0.6 * weights


def test_layer_by_layer_a_loss_that_is_not_finite_stops_everything(corpus, tmp_path):
    config = small(corpus, tmp_path, "galore")
    config.layerwise = True
    job = load(config)
    (state, fixed), batches, update = start(job), job.train.iterator(), jax.jit(make_update(job))
    state = update(state, fixed, batch_of(batches))
    broken = {path: leaf.at[(0,) * leaf.ndim].set(jnp.nan) for path, leaf in state.weights.items() if "norm" in path}
    after = update(state._replace(weights=state.weights | broken), fixed, batch_of(batches))
    after = update(after._replace(weights=state.weights), fixed, batch_of(batches))  # whatever comes next
    assert (int(after.step), bool(after.ok)) == (1, False)
    for path, leaf in state.weights.items():
        assert np.array_equal(leaf, after.weights[path]), path
    assert float(after.loss) == float(state.loss)


@pytest.mark.parametrize(
    ("recipe", "layerwise"),
    [
        ("adamw", False),
        ("adamw", True),
        ("galore", False),
        ("galore", True),
        ("dual_galore", False),
        ("sltrain", False),
    ],
)
def test_a_mesh_changes_nothing(recipe, layerwise, corpus, tmp_path):
    """Three updates on fsdp x tensor = 4 x 2 are those of one device."""
    config = small(corpus, tmp_path, recipe)
    config.layerwise = layerwise
    config.eps = 1e-3  # the sign of a gradient that is nothing but rounding is no test of a mesh
    ends = []
    for mesh in ({"fsdp": 1, "tensor": 1}, {"fsdp": 4, "tensor": 2}):
        config.mesh.update(mesh)
        job = load(config)
        state, fixed = start(job)
        batches = job.train.iterator()
        update = jax.jit(make_update(job))
        for step in range(3):
            batch = batch_of(batches)
            if job.learner.refresh is not None and step == 2:
                state, fixed = jax.jit(make_refresh(job))(state, fixed, batch)
            state = update(state, fixed, batch)
        ends.append((float(state.loss), flatten(merged(job, state, fixed))))
        largest = max(jax.tree.leaves(state.optimizer[0]), key=lambda x: x.size)
    assert largest.addressable_shards[0].data.size * 4 <= largest.size  # moments lie where their weights do
    (loss, one), (sharded_loss, sharded) = ends
    assert loss == pytest.approx(sharded_loss, rel=1e-5)
    if recipe == "adamw":  # a subspace's basis may turn where singular values lie close
        for path, leaf in one.items():
            np.testing.assert_allclose(leaf, sharded[path], atol=2e-3, err_msg=path)


def test_no_dense_matrix_of_sltrain_is_stored(corpus, tmp_path):
    job = load(small(corpus, tmp_path, "sltrain"))
    state, fixed = start(job)
    assert not fixed.held and not [path for path in state.weights if is_adapted(job.learner, path)]
    dense = sum(x.size for path, x in flatten(job.shapes).items() if is_adapted(job.learner, path))
    assert sum(x.size for x in jax.tree.leaves(state.factors)) < dense
    made = {path: x for path, x in flatten(parameters(job, state, fixed)).items() if is_adapted(job.learner, path)}
    assert made and not any(x.any() for x in made.values())


def test_the_rate_rises_again_after_relora_merges(corpus, tmp_path):
    config = small(corpus, tmp_path, "relora")
    config.decay, config.warmup = "constant", 0.0
    schedule = rate(load(config))
    assert [round(float(schedule(step)) / config.learning_rate, 2) for step in (0, 7, 8, 9, 10, 11)] == [
        1,
        1,
        0.33,
        0.67,
        1,
        1,
    ]


def test_norms_do_not_decay(corpus, tmp_path):
    config = small(corpus, tmp_path, "adamw")
    config.learning_rate, config.weight_decay, config.warmup = 1e-12, 1e10, 0.0
    job = load(config)
    state, fixed = start(job)
    batch = {n: jnp.asarray(v) for n, v in next(job.train.iterator()).items() if n in ("tokens", "loss_mask")}
    after = jax.jit(make_update(job))(state, fixed, batch).weights
    moved = {path for path, leaf in state.weights.items() if np.abs(after[path] - leaf).max() > 1e-6}
    assert moved == {path for path in state.weights if not path.endswith("scale")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update({"steps": 0}), "config.steps=0"),
        (lambda c: c.model.update({"size": "2b"}), "config.model.size='2b'"),
        (lambda c: c.model.update({"heads": 3}), "config.model.heads=3"),
        (lambda c: c.tokenizer.update({"vocab_size": 100}), "vocab_size=100"),
        (lambda c: c.data.update({"name": "tweets", "directory": ""}), "not running text"),
        (lambda c: c.update({"weight_decay": 0.1, "method": method("dual_galore", rank=4)}), "config.weight_decay=0.1"),
        (lambda c: c.update({"method": method("galore", rank=99)}), "galore\\(rank=99\\)"),
        (lambda c: c.update({"method": method("galore", rank=4, refresh_every=0)}), "refresh_every"),
        (lambda c: c.update({"layerwise": True, "accumulate": 2}), "config.accumulate=2: expected 1 with layerwise"),
        (lambda c: c.update({"layerwise": True, "clip": 1.0}), "config.clip=1.0: expected 0.0 with layerwise"),
        (
            lambda c: c.update({"layerwise": True}) or c.__setattr__("method", method("lisa")),
            "lisa does not update layers",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_fields_are_named(change, says, corpus, tmp_path):
    config = small(corpus, tmp_path, "adamw")
    with config.unlocked():
        change(config)
    with pytest.raises((ConfigError, ValueError), match=says):
        start(load(config))
    assert not (tmp_path / "run").exists()


def test_unknown_methods_and_fields_are_named():
    with pytest.raises(ConfigError, match="config.method.name='sgd': expected one of adamw"):
        method("sgd")
    with pytest.raises(ConfigError, match="config.method.ranks=3: expected a field of galore: rank"):
        method("galore", ranks=3)
    with pytest.raises(ConfigError, match="Did you mean 'galore'"):
        get_config("galor")
    assert base().method.name == "adamw"
    assert dataclasses.is_dataclass(loop.Result)


def test_the_papers_sizes():
    config = get_config("7b/galore")
    assert (config.method.rank, config.method.refresh_every, config.learning_rate) == (1024, 500, 0.005)
