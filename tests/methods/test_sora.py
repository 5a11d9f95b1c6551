"""SoRA: the proximal step, the threshold's stages, gates that close and come back, and the LoRA that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, params_of, training

import lowrank_jax as lr
from lowrank_jax.optim.soft_threshold import soft_threshold, threshold_stages

K = kernel(12, 10)


def after_one_update(compat, gates, threshold=0.1):
    """The gates after an update of zero."""
    adapters = adapt(K, lr.sora(rank=4, threshold=threshold, compat=compat))
    tx = lr.optim.with_methods(optax.sgd(1.0), adapters.plan, 10)
    train = {PATH: {**adapters.sites[PATH], "e": jnp.asarray(gates, jnp.float32)}}
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, train), tx.init(train), train)
    assert not np.asarray(updates[PATH]["a"]).any() and not np.asarray(updates[PATH]["b"]).any()
    return np.asarray(optax.apply_updates(train, updates)[PATH]["e"])


@pytest.mark.parametrize(("compat", "expected"), [("paper", [2, 0.5, 0, -0.5]), ("official", [2, 0, 0, 0])])
def test_the_proximal_step_is_soft_where_the_releases_jumps(compat, expected):
    got = after_one_update(compat, [0.3, 0.15, 0.05, -0.15])
    np.testing.assert_allclose(got, 0.1 * np.asarray(expected), rtol=0, atol=1e-7)
    assert (got[np.asarray(expected) == 0] == 0).all()


def test_the_step_follows_the_optimizers():
    """Decay and momentum are in the value that is drawn, and a closed gate opens again under a strong gradient."""
    tx = optax.chain(optax.adamw(0.2, weight_decay=0.1), soft_threshold("e", 0.05))
    alone = optax.adamw(0.2, weight_decay=0.1)
    params = {"x": {"e": jnp.array([0.5, -0.04, 0.0, 0.0])}}
    gradient = {"x": {"e": jnp.array([0.3, 0.0, 0.0, -1.0])}}
    free = optax.apply_updates(params, alone.update(gradient, alone.init(params), params)[0])["x"]["e"]
    new = optax.apply_updates(params, tx.update(gradient, tx.init(params), params)[0])["x"]["e"]
    np.testing.assert_allclose(new, np.sign(free) * np.maximum(np.abs(free) - 0.05, 0), rtol=0, atol=1e-7)
    assert (np.asarray(new) == 0).tolist() == [False, True, True, False]


def test_a_larger_threshold_leaves_fewer_gates():
    open_gates = []
    for threshold in (0.0, 0.01, 0.02, 0.05):
        adapters = adapt(K, lr.sora(rank=8, threshold=threshold))
        tx = lr.optim.with_methods(optax.adamw(1e-2), adapters.plan, 40)
        *_, last = training(adapters, K, tx, 40)
        open_gates.append(int((leaves_of(last)["e"] != 0).sum()))
    assert open_gates == sorted(open_gates, reverse=True)
    assert open_gates[0] == 8 > open_gates[2] > open_gates[3]


@pytest.mark.parametrize("total", [6, 7, 20])
def test_stages_share_the_run_equally(total):
    tx = soft_threshold("e", (0.0, 1.0, 2.0), total)
    params = {"x": {"e": jnp.array([10.0])}}
    state, drawn = tx.init(params), []
    for _ in range(total):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        drawn.append(-float(updates["x"]["e"][0]))
    assert drawn == [float(3 * step // total) for step in range(total)]


def test_schedules_are_equally_spaced_where_they_say():
    linear, log, exp = (threshold_stages(0.5, 2.0, 7, schedule) for schedule in ("linear", "log_linear", "exp_linear"))
    for levels, there in ((linear, np.positive), (log, np.exp), (exp, np.log)):
        assert len(levels) == 7
        np.testing.assert_allclose(there(levels), np.linspace(there(0.5), there(2.0), 7), rtol=1e-12)
    assert threshold_stages(0.5, 2.0, 1) == (2.0,)


def test_init_has_normal_gates_and_changes_nothing():
    p = leaves_of(adapt(kernel(4, 300, 200), lr.sora(rank=200)))
    assert not p["b"].any()
    assert 0.95 / np.sqrt(300) < np.abs(p["a"]).max() <= 1 / np.sqrt(300)
    assert abs(p["e"].mean()) < 0.1 and abs(p["e"].std() - 1) < 0.1


def test_penalty_is_the_mean_over_all_gates():
    adapters = adapt(K, lr.sora(rank=4, l1=3.0))
    np.testing.assert_allclose(
        lr.penalty(params_of(K), adapters), 3 * np.abs(leaves_of(adapters)["e"]).mean(), rtol=1e-6
    )
    assert lr.sora().penalty is None


def test_compact_keeps_the_scale():
    """A scale of alpha over what is left would act otherwise."""
    weight = kernel(2, 12, 10)
    adapters = adapt(weight, lr.sora(rank=4, alpha=8))
    leaves = {**adapters.sites[PATH], "b": kernel(2, 4, 10, seed=5), "e": jnp.array([[0.0, 2, 0, 3], [1, 0, 0, 0]])}
    adapters = adapters.replace(sites={PATH: leaves})
    small = lr.compact(adapters)
    assert small.plan.entries[0].method == lr.lora(rank=(2, 1), alpha=4)
    assert small.plan.trainable == 3 * 22
    np.testing.assert_allclose(delta(small, weight), delta(adapters, weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"threshold": -1.0}, {"first": 0.0, "stages": 2, "schedule": "exp_linear"}, {"stages": 0}, {"schedule": "cosine"},
     {"l1": -1.0}, {"compat": "release"}, {"dropout": 1.0}],
)  # fmt: skip
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"sora\\({next(iter(fields))}="):
        lr.sora(**fields)
