"""SaRA: which entries, where they start, its two stages, its penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, params_of, training

import lowrank_jax as lr
from lowrank_jax.methods.nuclear import nuclear_norm

K = kernel(12, 10)


def dense(values, indices, shape=K.shape):
    out = np.zeros(shape).reshape(-1)
    out[np.asarray(indices)] = values
    return out.reshape(shape)


@pytest.mark.parametrize("fields", [{"fraction": 0.3}, {"threshold": 0.4}])
def test_the_output_starts_at_the_base_and_p_at_the_signed_weights(fields):
    """The release starts from |p|: then a model changes before it is trained."""
    adapters = adapt(K, lr.sara(**fields))
    p = adapters.sites[PATH]
    assert not np.asarray(delta(adapters, K)).any()
    assert (lr.merge(params_of(K), adapters)["layer"]["kernel"] == K).all()
    assert (p["p"] == K.reshape(-1)[p["indices"]]).all() and (np.asarray(p["p"]) < 0).any()


def test_the_smallest_entries_are_chosen():
    p = adapt(K, lr.sara(fraction=0.3)).sites[PATH]
    expected = np.sort(np.argsort(np.abs(np.asarray(K)).reshape(-1))[:36])
    assert np.asarray(p["indices"]).tolist() == expected.tolist()
    p = adapt(K, lr.sara(threshold=0.4)).sites[PATH]
    assert np.asarray(p["indices"]).tolist() == np.flatnonzero(np.abs(np.asarray(K)) < 0.4).tolist()


def test_a_threshold_is_counted_in_every_layer():
    weight = jnp.stack([K, 10 * K, 0.1 * K])
    adapters = adapt(weight, lr.sara(threshold=0.4))
    counts = (np.abs(np.asarray(weight)) < 0.4).sum((1, 2))
    assert len(set(counts)) == 3 and counts[2] == K.size
    assert adapters.plan.trainable == adapters.plan.count(9, 10) == counts.sum()
    trained = list(training(adapters, weight, optax.adamw(1e-2), 8))[-1]
    changed = np.asarray(delta(trained, weight)) != 0
    assert (changed == (np.abs(np.asarray(weight)) < 0.4)).all()
    config = dict(adapters.plan.entries[0].method.config)
    assert lr.build("sara", config) == adapters.plan.entries[0].method
    nothing = adapt(10 + 0 * K, lr.sara(threshold=0.4))
    assert nothing.plan.trainable == 0 and not np.asarray(delta(nothing, 10 + 0 * K)).any()


@pytest.mark.parametrize("fields", [{"fraction": 0.5}, {"threshold": 0.6}])
def test_the_second_stage_trains_what_is_still_below_with_fresh_moments(fields):
    total = 10
    adapters = adapt(K, lr.sara(**fields, progressive=0.4))
    assert adapters.plan.phases(total) == (0, 4)
    assert set(lr.partition(adapters, 3, total)[0][PATH]) == {"p"} and set(
        lr.partition(adapters, 4, total)[0][PATH]
    ) == {"p2"}
    tx = optax.adamw(0.1, weight_decay=0.1)
    history = [a.sites[PATH] for a in training(adapters, K, tx, total)]
    first, middle, last = history[0], history[4], history[-1]
    limit = fields.get("threshold", float(np.abs(np.asarray(first["p0"])).max()))
    below = np.abs(np.asarray(middle["p"])) <= limit
    assert 0 < below.sum() < below.size, "the stages would be the same"
    assert all((h["p2"] == 0).all() for h in history[:5]) and (middle["p"] == last["p"]).all()
    assert ((np.asarray(last["p2"]) != 0) == below).all()
    chosen = np.asarray(first["indices"])
    change = np.asarray(delta(adapters.replace(sites={PATH: last}), K), np.float64)
    expected = np.asarray(last["p"], np.float64) + np.where(below, last["p2"], 0) - np.asarray(first["p"])
    np.testing.assert_allclose(change, dense(expected, chosen), atol=1e-6)
    # With fresh moments the first step is as long at every entry; Adam's own counter goes on, this is its fifth step.
    length = 0.1 * (0.1 / (1 - 0.9**5)) / (0.001 / (1 - 0.999**5)) ** 0.5
    np.testing.assert_allclose(np.abs(np.asarray(history[5]["p2"]))[below], length, rtol=1e-3)


@pytest.mark.parametrize("fields", [{"fraction": 0.5}, {"threshold": 0.6}])
def test_what_is_left_after_training_are_positions_and_changes(fields):
    weight = jnp.stack([K, 2 * K])
    trained = list(training(adapt(weight, lr.sara(**fields)), weight, optax.adamw(0.1), 6))[-1]
    small = lr.compact(trained)
    assert small.plan.entries[0].method.name == "sparse_update" and small.plan.trainable == 0
    assert lr.count(small).bytes == lr.count(trained).bytes / 2
    assert (delta(small, weight) == delta(trained, weight)).all()


def test_one_stage_only():
    adapters = adapt(K, lr.sara(progressive=1.0))
    assert set(adapters.sites[PATH]) == {"indices", "p", "p0"} and adapters.plan.phases(10) == (0,)


def test_what_is_not_chosen_keeps_its_bits():
    adapters = adapt(K, lr.sara(fraction=0.3))
    trained = list(training(adapters, K, optax.adamw(0.1, weight_decay=0.1), 6))[-1]
    merged = np.asarray(lr.merge(params_of(K), trained)["layer"]["kernel"])
    same = merged == np.asarray(K)
    assert same.sum() == K.size - 36 and not same.reshape(-1)[np.asarray(adapters.sites[PATH]["indices"])].any()


@pytest.mark.parametrize("shape", [(12, 10), (7, 20)])
def test_the_nuclear_gradient_is_u_vt_at_the_entries(shape):
    full = np.arange(shape[0] * shape[1])
    w = np.asarray(kernel(*shape), np.float64)
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    value, gradient = jax.value_and_grad(nuclear_norm, argnums=1)(shape, jnp.float32(w.reshape(-1)), jnp.asarray(full))
    np.testing.assert_allclose(value, sigma.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, (u @ vt).reshape(-1), atol=1e-5)


@pytest.mark.parametrize("values", [np.zeros(4), np.ones(4), np.array([1.0, 0, 0, 0])])
def test_the_nuclear_gradient_is_finite_where_singular_values_coincide(values):
    indices = jnp.array([0, 11, 22, 33])  # a diagonal
    gradient = jax.grad(nuclear_norm, argnums=1)(K.shape, jnp.float32(values), indices)
    np.testing.assert_allclose(gradient, np.sign(values), atol=1e-6)


def penalised(method):
    """A weight, a stack of two, and one too narrow."""
    params = {
        "one": {"kernel": kernel(12, 10)},
        "stack": {"kernel": kernel(2, 12, 10, seed=1), "bias": jnp.zeros((2, 10))},
        "thin": {"kernel": kernel(12, 3)},
    }
    return params, lr.init(jax.random.key(0), params, lr.plan(params, {".*/kernel": method}))


@pytest.mark.parametrize("fields", [{"fraction": 0.5}, {"threshold": 0.5}])
def test_one_matrix_a_step_is_penalised(fields):
    params, adapters = penalised(lr.sara(**fields, nuclear=0.1, nuclear_above=9))
    train, frozen = lr.partition(adapters)
    matrices = [("one/kernel", 0), ("stack/kernel", 0), ("stack/kernel", 1)]
    alone = []
    for path, layer in matrices:
        w = np.asarray(params[path.split("/")[0]]["kernel"], np.float64).reshape(-1, 12, 10)[layer]
        limit = fields.get("threshold", np.sort(np.abs(w).reshape(-1))[59])
        alone.append(0.1 * np.linalg.svd(np.where(np.abs(w) <= limit, w, 0), compute_uv=False).sum())
    np.testing.assert_allclose(lr.penalty(params, adapters), np.mean(alone), rtol=1e-5)
    step = jax.jit(jax.value_and_grad(lambda train, key: lr.penalty(params, lr.join(train, frozen), key)))
    seen = set()
    for n in range(20):
        value, gradient = step(train, jax.random.key(n))
        which = int(np.argmin(np.abs(np.array(alone) - float(value))))
        np.testing.assert_allclose(value, alone[which], rtol=1e-5)
        moved = {
            (path, layer)
            for path, leaves in gradient.items()
            for layer, g in enumerate(np.asarray(leaves["p"]).reshape(-1, leaves["p"].shape[-1]))
            if g.any()
        }
        assert moved == {matrices[which]}
        seen.add(which)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    "fields", [{"fraction": 0.0}, {"fraction": 1.5}, {"threshold": 0.0}, {"progressive": 0.0}, {"nuclear": -1.0}]
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"sara\\({next(iter(fields))}="):
        lr.sara(**fields)


def test_an_update_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"sparse_update\(entries=0\)"):
        lr.build("sparse_update", {"entries": 0})


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="sara at layer/kernel: fraction=0.005 of 120 entries is none"):
        adapt(K, lr.sara(fraction=0.005))
    with pytest.raises(ValueError, match="sara at layer/kernel: 4294967296 entries are too many"):
        lr.plan(params_of(jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)), {"layer/kernel": lr.sara()})
