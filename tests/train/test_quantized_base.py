"""Runs on a quantised base: what is held and saved, and that every command computes on the same base."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax.checkpoint import CheckpointError
from lowrank_jax.quantized import is_quantized
from lowrank_jax.sites import flatten
from lowrank_jax.unread import Unread
from tests.train import tiny
from train import base, evaluation, job, loop, preview, saved
from train import config as configs


def config(root, method="lamda", kind="nf4", **fields):
    out = tiny.config(root, method, **fields)
    out.model.quantize, out.model.quantize_block = kind, 16
    out.steps, out.eval_every, out.checkpoint_every, out.data.max_length = 3, 0, 0, 8
    return out


def kernels(params):
    return {path: leaf for path, leaf in flatten(params).items() if "/layers/" in path and path.endswith("kernel")}


def test_a_run_holds_quantised_kernels_and_its_adapter_fits_no_other_base(tmp_path):
    this = job.load(config(tmp_path, "pissa"))
    assert all(isinstance(leaf, Unread) for leaf in kernels(this.params).values())
    result = loop.train(this)
    settings = saved.config(str(result.adapter))
    loaded, adapters = saved.load(str(result.adapter), settings)
    params, folded = base.under(settings, loaded.params, adapters)
    assert folded.folded and all(map(is_quantized, kernels(params).values()))
    scores = evaluation.evaluate(loaded, evaluation.forward(loaded), params, folded, loaded.evaluation)
    assert scores == pytest.approx(result.scores, abs=1e-5)
    settings.model.quantize = ""
    with pytest.raises(CheckpointError, match="nf4 in blocks of 16"):
        saved.load(str(result.adapter), settings)


def test_shapes_alone_give_the_same_base_and_a_mesh_its_layout(tmp_path):
    settings = config(tmp_path, "pissa", kind="int8")
    settings.mesh.fsdp = 2
    this = job.load(settings)
    adapters = lr.init(jax.random.key(0), this.params, this.plan)
    params, folded = base.under(settings, this.params, adapters)
    shapes = preview.abstract_model(settings, 3, this.mesh).params
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)  # noqa: E731
    assert described(params) == described(shapes)
    assert any("fsdp" in leaf.sharding.spec for leaf in kernels(params).values())
    exact = base.alone(settings, this.params)
    merged, plain = lr.merge(params, folded), lr.dequantize(exact)
    path = "encoder/layers/attention/query/kernel"
    weight = flatten(this.params)[path].dense()
    assert jnp.linalg.norm(flatten(merged)[path] - weight) < jnp.linalg.norm(flatten(plain)[path] - weight)


def test_generation_runs_beside_a_quantised_base():
    model, x = nn.Dense(8), jax.random.normal(jax.random.key(0), (4, 64))
    params = model.init(jax.random.key(1), x)["params"]
    for weights in (params, lr.quantize(params, {"kernel": "nf4"})):
        plan = lr.plan(weights, {"kernel": lr.lora(2)})
        adapters = jax.tree.map(lambda leaf: leaf + 0.1, lr.init(jax.random.key(1), weights, plan))
        apply, given = base.for_generation(model, weights, adapters)
        held = [leaf.dtype.name for leaf in jax.tree.leaves(given)]
        assert ("uint8" in held) == (weights is not params)
        expected = model.apply({"params": lr.merge(weights, adapters)}, x)
        assert jnp.abs(apply({"params": given}, x) - expected).max() < 1e-5


def test_bad_settings_name_the_field(tmp_path):
    with pytest.raises(configs.ConfigError, match="config.model.quantize='int4': expected '' or one of int8, nf4"):
        configs.check(config(tmp_path, kind="int4"))
    with pytest.raises(configs.ConfigError, match="config.model.quantize='nf4': expected '', as lamda_pp"):
        configs.check(config(tmp_path, "lamda_pp"))
