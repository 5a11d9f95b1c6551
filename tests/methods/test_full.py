"""Full fine-tuning: of weights, and of the parameters no low-rank method applies to."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x))


X = jax.random.normal(jax.random.key(0), (4, 6))
PARAMS = Net().init(jax.random.key(1), X)["params"]


def test_biases_and_norms_train_with_the_head_and_merge():
    plan = lr.plan(PARAMS, {".*": lr.full()}, sites=lr.linen.sites(Net(), PARAMS, X))
    adapters = lr.init(jax.random.key(2), PARAMS, plan)
    assert plan.trainable == plan.base_count == 6 * 3 + 3 + 6 + 6
    assert set(adapters.sites) == {"head/kernel", "head/bias", "norm/scale", "norm/bias"}
    train, frozen = lr.partition(adapters)
    loss = lambda train: jnp.mean((lr.linen.apply(Net(), PARAMS, lr.join(train, frozen), X) - 1) ** 2)  # noqa: E731
    plain = jax.grad(lambda params: jnp.mean((Net().apply({"params": params}, X) - 1) ** 2))(PARAMS)
    gradient = jax.grad(loss)(train)
    for path, leaves in gradient.items():
        module, name = path.split("/")
        np.testing.assert_allclose(leaves["weight"], plain[module][name], atol=1e-6)
    train = optax.apply_updates(train, jax.tree.map(lambda g: -0.1 * g, gradient))
    merged = lr.merge(PARAMS, lr.join(train, frozen))
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)


def test_low_rank_methods_refuse_a_bias():
    with pytest.raises(ValueError, match=r"norm/scale.*lora applies to conv, dense, embed weights only"):
        lr.plan(PARAMS, {"norm/scale": lr.lora(2)})


def test_each_part_may_have_its_own_method():
    plan = lr.plan(PARAMS, {"head": lr.lora(2), "head/bias": lr.full(), "norm": lr.full()})
    assert {e.site.path: e.method.name for e in plan.entries} == {
        "head/bias": "full", "head/kernel": "lora", "norm/bias": "full", "norm/scale": "full",
    }  # fmt: skip
