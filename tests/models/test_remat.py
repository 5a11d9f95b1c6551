"""The policies for frozen bases: the same gradients, no product with a weight a second time, and less memory than any stock policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.models import BertConfig, LlamaConfig

LINEAR = r".*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|query|key|value|attention/output|intermediate|mlp/output)"
CONFIGS = {
    "llama": LlamaConfig.tiny(qk_norm=True, scan_layers=True),
    "llama, loop": LlamaConfig.tiny(),
    "bert": BertConfig.tiny(task="classify", num_labels=3, scan_layers=True),
}
METHODS = {"lora": lr.lora(rank=2), "lamda": lr.lamda(rank=2, init="svd_zero"), "bottleneck": lr.bottleneck(width=2)}


def step(config, method, tokens, train_at: int = 0):
    """The gradient of an adapter's trained leaves, as a function of (train, frozen, params), and those arguments."""
    model, params = models.build(config), random_params(dataclasses.replace(config, remat="none"))
    plan = lr.plan(params, {LINEAR: method}, sites=lr.linen.sites(model, params, tokens))
    train, frozen = lr.partition(lr.init(jax.random.key(0), params, plan), train_at, 100)

    def loss(train, frozen, params):
        return lr.linen.apply(model, params, lr.join(train, frozen), tokens).var()

    return jax.value_and_grad(loss), (train, frozen, params)


@pytest.mark.parametrize(
    ("name", "method", "remat"),
    [
        ("llama", "lora", "adapter"),
        ("llama, loop", "lamda", "adapter"),
        ("bert", "lora", "adapter"),
        ("llama", "bottleneck", "adapter"),
        ("llama", "lamda", "adapter_offload"),
    ],
)
def test_values_and_gradients_stay(name, method, remat):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 10)))
    plain, args = step(CONFIGS[name], METHODS[method], tokens)
    ours, _ = step(dataclasses.replace(CONFIGS[name], remat=remat), METHODS[method], tokens)
    (value, gradient), (again, regradient) = jax.jit(plain)(*args), jax.jit(ours)(*args)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), regradient, gradient)
    assert any(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradient))


def costs(config, method, train_at):
    tokens = jnp.zeros((4, 64), jnp.int32)
    function, args = step(config, method, tokens, train_at)
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("method", "train_at"), [("lora", 0), ("lamda", 99)])
def test_less_memory_than_any_stock_policy_of_the_same_work(method, train_at):
    config = LlamaConfig.tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=8, scan_layers=True)
    found = {
        remat: costs(dataclasses.replace(config, remat=remat), METHODS[method], train_at)
        for remat in ("none", "dots", "dots_saveable", "full", "adapter")
    }
    flops, ours = found.pop("adapter")
    # A product with a weight a second time would be a sixth of the step; what is left is attention within the heads.
    assert flops < 1.01 * found["dots"][0]
    assert found["full"][0] > 1.2 * flops
    same_work = [bytes for work, bytes in found.values() if work <= 1.01 * flops]
    assert len(same_work) == 3
    assert ours < 0.7 * min(same_work)


def test_the_policies_serve_models_of_ones_own():
    def layer(x, w):
        return jnp.sin(lr.remat.nonlinear_input(x @ w))

    x, w = jnp.ones((4, 4)), jnp.eye(4)

    def products(policy):
        remat = jax.checkpoint(layer, policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda x: remat(x, w).sum()))(x)).count("dot_general")

    assert products(lr.remat.policy()) == 2
    assert products(jax.checkpoint_policies.nothing_saveable) == 3
