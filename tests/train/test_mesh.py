"""A run over eight devices trains what a run on one does, and other ways to run end to end too."""

from __future__ import annotations

import jax
import pytest
import tiny

from train import loop


def _run(root, workdir, method, size, **model):
    config = tiny.config(root, method)
    config.workdir, config.steps, config.eval_every, config.checkpoint_every = str(workdir), 4, 0, 2
    config.eval_batch_size = 12
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = size
    if method == "lamda":
        config.adapter.freeze = 0.5
    if method == "full":
        config.adapter.pattern = "encoder/.*"
    config.model.update(model)
    return loop.run(config)


def test_a_sharded_run_ends_where_one_device_does(root, tmp_path):
    assert jax.device_count() == 8
    one, eight = (_run(root, tmp_path / str(size), "lamda", size) for size in (1, 2))
    assert eight.scores["loss"] == pytest.approx(one.scores["loss"], rel=1e-5)
    assert _run(root, tmp_path / "2", "lamda", 2).scores == eight.scores  # restored onto the mesh


def test_full_fine_tuning_in_bfloat16_with_remat_and_dropout_runs(root, tmp_path):
    result = _run(root, tmp_path, "full", 1, dtype="bfloat16", remat="full", dropout=True)
    assert result.trainable == result.trainable_end
    assert 0 < result.scores["loss"] < 2
