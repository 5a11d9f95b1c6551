"""Mixtures of experts: routing, capacity, adapters on all experts of a layer, and experts dealt out over a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_weights import random_params

import lowrank_jax as lr
from lowrank_jax import models, shard
from lowrank_jax.models import LlamaConfig
from train import sharding

CONFIG = LlamaConfig.tiny(architecture="mixtral", num_local_experts=4, scan_layers=True)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 12)))
LINEAR = r"layers/.*_proj"


def logits(config, params, tokens=TOKENS):
    return jax.jit(models.build(config).apply)({"params": params}, tokens)


def test_a_large_capacity_is_exact_and_a_small_one_leaves_tokens_out():
    params = random_params(CONFIG)
    exact = logits(CONFIG, params)
    np.testing.assert_allclose(logits(dataclasses.replace(CONFIG, capacity_factor=2.0), params), exact, atol=1e-5)
    little = logits(dataclasses.replace(CONFIG, capacity_factor=0.5), params)
    # Far apart, so that the equality above and below is not that of a model that ignores its experts.
    assert not np.allclose(little, exact, atol=1e-2) and bool(jnp.isfinite(little).all())
    # Places go to earlier tokens: the first one of a row always has its experts.
    np.testing.assert_allclose(little[:, 0], exact[:, 0], atol=1e-5)


@pytest.mark.parametrize("method", [lr.lora(rank=2), lr.lamda(rank=3)], ids=lambda m: m.name)
def test_an_adapter_of_all_experts_acts_like_its_merged_weights(method):
    model, params = models.build(CONFIG), random_params(CONFIG)
    plan = lr.plan(params, {LINEAR: method}, sites=lr.linen.sites(model, params, TOKENS))
    by_path = plan.by_path
    up = by_path["layers/moe/experts/up_proj/kernel"]
    assert up.route == "factored" and up.site.batch_shape == (2, 4) and len(by_path) == 7
    adapters = lr.init(jax.random.key(0), params, plan)
    train, frozen = lr.partition(adapters)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)  # noqa: E731
    adapters = lr.join(jax.tree.map(noise, train), frozen)
    got = jax.jit(lambda p, a: lr.linen.apply(model, p, a, TOKENS))(params, adapters)
    # The adapter is seen to act; else the merged weights would agree whatever it is.
    assert not np.allclose(got, logits(CONFIG, params), atol=1e-2)
    np.testing.assert_allclose(got, logits(CONFIG, lr.merge(params, adapters)), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("sizes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "tensor": 2, "data": 2}])
def test_updates_with_experts_dealt_out_agree_with_one_device(sizes, monkeypatch):
    monkeypatch.setattr(lr.forms.base, "REPLICATED_BELOW", 1)
    mesh, config = shard.mesh(sizes), dataclasses.replace(CONFIG, capacity_factor=1.5)
    params = random_params(config)
    layout = shard.layout(params, mesh, names=models.logical_axes(config))
    assert layout["layers"]["moe"]["experts"]["up_proj"]["kernel"].spec[1] == "expert"
    dealt = jax.device_put(params, layout)
    factors = _update(config, dealt, mesh)[1]["layers/moe/experts/up_proj/kernel"]
    assert factors["b"].sharding.spec[1] == "expert"
    one, many = _run(config, params, None), _run(config, dealt, mesh)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * max(np.abs(want).max(), 1e-3), err_msg=str(path))


def test_devices_with_experts_have_rows_of_their_own_elsewhere():
    config = dataclasses.replace(CONFIG, capacity_factor=1.5)
    params, mesh = random_params(config), shard.mesh({"expert": 4, "data": 2})
    layout = shard.layout(params, mesh, names=models.logical_axes(config))
    one = _update(config, params, None)
    many = _update(config, jax.device_put(params, layout), mesh)
    one, many = (step.lower(*arguments).compile() for step, *arguments in (one, many))
    # Nothing is computed twice: were rows dealt out over 'data' only, attention would be computed by four devices each.
    assert many.cost_analysis()["flops"] == pytest.approx(one.cost_analysis()["flops"] / 8, rel=0.1)
    assert "all-to-all" in many.as_text(), "tokens go to the devices of their experts and to no other"


def _run(config, params, mesh):
    step, train, *rest = _update(config, params, mesh)
    for _ in range(4):
        train = step(train, *rest)
    return jax.tree.map(np.asarray, train)


def _update(config, params, mesh):
    """An update and its arguments, the trained leaves first."""
    model, tokens = models.build(config), jnp.concatenate([TOKENS, TOKENS[::-1, ::-1]])
    plan = lr.plan(params, {LINEAR: lr.lora(rank=2)}, sites=lr.linen.sites(model, params, tokens))
    train, frozen = lr.partition(lr.init(jax.random.key(0), params, plan))
    if mesh is not None:
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(shard.ROWS)))
    tx = optax.sgd(0.5)

    def update(train, params, frozen, tokens):
        def loss(train):
            losses = lr.linen.apply(model, params, lr.join(train, frozen), tokens, targets=jnp.roll(tokens, -1, 1))
            return losses.mean()

        return optax.apply_updates(train, tx.update(jax.grad(loss)(train), tx.init(train))[0])

    return jax.jit(update if mesh is None else sharding.within(mesh, update)), train, params, frozen, tokens
