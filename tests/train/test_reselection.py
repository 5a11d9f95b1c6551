"""A run of SpIEL-AG exchanges entries between updates, and goes on after a stop as if there had been none."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

import lowrank_jax as lr
from lowrank_jax.optim.spiel_steps import SpielMoments
from train import config as configs
from train import job, loop, optimizer, saved
from train.reselection import Reselection
from train.step import Stepper


def _config(root, workdir, growth="gradient"):
    config = tiny.config(root, "full")  # writes the files
    config.adapter = configs.rule(
        "spiel", r"encoder/.*/(query|value)", density=0.05, growth=growth, first=2, every=4, share=0.5
    )
    config.workdir, config.eval_every, config.data.max_length = str(workdir), 0, 8
    return config


def _positions(adapters):
    return {path: set(zip(*(np.asarray(own[n]).ravel().tolist() for n in ("row", "column")), strict=True))
            for path, own in adapters.sites.items() if "row" in own}  # fmt: skip


def test_entries_move_and_an_interrupted_run_ends_the_same(root, tmp_path, monkeypatch):
    config = _config(root, tmp_path / "whole")
    loaded = job.load(config)
    first = _positions(lr.init(jax.random.key(config.seed), loaded.params, loaded.plan))
    result = loop.run(config)
    last = _positions(saved.load(str(result.adapter), saved.config(str(result.adapter)))[1])
    assert all(len(last[path] - first[path]) >= 1 for path in first)

    # The checkpoint of update 6 is from before the exchange of that moment.
    update = Stepper.__call__

    def stops(self, state, *rest):
        if int(state.step) == 7:
            raise KeyboardInterrupt
        return update(self, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stepper, "__call__", stops)
        loop.run(_config(root, tmp_path / "stopped"))
    again = loop.run(_config(root, tmp_path / "stopped"))
    name = "adapter.safetensors"
    assert (again.adapter / name).read_bytes() == (result.adapter / name).read_bytes()


def test_when_entries_are_exchanged(root, tmp_path):
    config = _config(root, tmp_path)
    reselection = Reselection(job.load(config))
    assert [step for step in range(13) if reselection.due(step)] == [2, 6, 10]
    none = Reselection(job.load(_config(root, tmp_path, "momentum")))
    assert not any(none.due(step) for step in range(13))
    config.more.other = configs.rule("spiel", r"encoder/.*/output", density=0.1, growth="gradient", first=3, every=4)
    with pytest.raises(
        ValueError, match=r"different updates \(first, every\): \[\(2, 4\), \(3, 4\)\]; expected the same"
    ):
        Reselection(job.load(config))


def test_the_optimizer_counts_the_age_of_every_entry(root, tmp_path):
    loaded = job.load(_config(root, tmp_path))
    train, _ = lr.partition(lr.init(jax.random.key(0), loaded.params, loaded.plan))
    state = optimizer.make(loaded.config, loaded.plan, 12).init(train)
    found = [
        x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SpielMoments)) if isinstance(x, SpielMoments)
    ]
    (moments,) = found
    assert all(moments.age[path]["v"].shape == own["v"].shape for path, own in train.items() if "row" in own)
