"""SLTrain: what the weight is made of, where its entries are, what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, params_of, training

import lowrank_jax as lr
from lowrank_jax.forms import Call
from lowrank_jax.memory import compile_report
from lowrank_jax.methods.sltrain import one_in_each_stretch

ZERO = jnp.zeros((30, 20))
SUPPORTS = ["uniform", "stratified"]


def moved(adapters):
    """Every trained leaf random."""
    train, frozen = lr.partition(adapters)
    return lr.join(jax.tree.map(lambda x: kernel(*x.shape, seed=5), train), frozen)


def positions(adapters):
    return np.asarray(lr.expand(adapters)[PATH].sparse.indices)


@pytest.mark.parametrize("support", SUPPORTS)
def test_outside_its_entries_the_weight_is_low_rank_and_in_all_it_is_not(support):
    adapters = moved(adapt(ZERO, lr.sltrain(rank=3, alpha=6, density=0.2, support=support)))
    weight = np.asarray(lr.merge(params_of(ZERO), adapters)["layer"]["kernel"], np.float64)
    p, free = leaves_of(adapters), np.zeros(600, bool)
    free[positions(adapters)] = True
    assert free.sum() == 120
    low_rank, difference = 2 * p["a"] @ p["b"], (weight - 2 * p["a"] @ p["b"]).reshape(-1)
    np.testing.assert_allclose(difference[~free], 0, atol=1e-5)
    np.testing.assert_allclose(difference[positions(adapters)], p["v"], atol=1e-5)
    assert np.linalg.matrix_rank(low_rank) == 3 and np.linalg.matrix_rank(weight) == 20


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("density", [0.03, 0.5, 0.7, 1.0])
def test_positions_are_different_and_exactly_as_many_as_asked(support, density):
    adapters = adapt(jnp.zeros((3, 30, 20)), lr.sltrain(rank=2, density=density, support=support))
    places = positions(adapters)
    assert places.shape == (3, int(density * 600)) and places.dtype == np.int32
    for layer in places:
        assert (np.diff(layer) > 0).all() and layer[0] >= 0 and layer[-1] < 600
    if density < 1:
        assert (places[0] != places[1]).any()
    trained = list(training(adapters, jnp.zeros((3, 30, 20)), optax.adamw(1e-2), 3))[-1]
    assert (positions(trained) == places).all()


def test_every_position_is_as_likely():
    seeds = jax.random.bits(jax.random.key(0), (4000, 2), jnp.uint32)
    drawn = np.asarray(jax.vmap(lambda seed: one_in_each_stretch(seed, 50, 8))(seeds))
    counts, expected = (
        np.bincount(drawn.reshape(-1), minlength=50),
        np.repeat(4000 / np.array([7] * 2 + [6] * 6), [7] * 2 + [6] * 6),
    )
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_init_is_purely_sparse():
    weight = jnp.zeros((400, 300))
    adapters = adapt(weight, lr.sltrain(rank=8, density=0.05))
    p, bound = leaves_of(adapters), 400**-0.5
    start = np.asarray(delta(adapters, weight), np.float64)
    assert (start != 0).sum() == 6000 and not p["b"].any()
    for values in (p["a"], p["v"]):
        assert 0.98 * bound < np.abs(values).max() <= bound and abs(values.mean()) < 0.05 * bound
        np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.03)
    assert not np.asarray(delta(adapt(weight, lr.sltrain(rank=8, init="finetune")), weight)).any()


@pytest.mark.parametrize("support", SUPPORTS)
def test_gradients_are_those_of_the_dense_weight(support):
    weight = kernel(30, 20)
    adapters = moved(adapt(weight, lr.sltrain(rank=3, alpha=6, density=0.2, support=support)))
    train, frozen = lr.partition(adapters)
    got, p = jax.grad(loss)(train, frozen, weight)[PATH], leaves_of(adapters)
    x, target = (np.asarray(kernel(7, n, seed=s), np.float64) for n, s in ((30, 1), (20, 2)))
    dense = x.T @ (2 * (x @ (np.asarray(weight, np.float64) + np.asarray(delta(adapters, weight))) - target))
    expected = {"a": 2 * dense @ p["b"].T, "b": 2 * p["a"].T @ dense, "v": dense.reshape(-1)[positions(adapters)]}
    assert set(got) == set(expected)
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5 * np.abs(want).max())


def test_the_backward_pass_keeps_no_dense_weight():
    """Sixteen scanned layers on a base of zeros made in the step: neither the base nor the sum is held for all of them."""
    layers, width = 16, 256
    dense = 4 * width * width
    adapters = adapt(jnp.zeros((layers, width, width)), lr.sltrain(rank=8))
    train, frozen = lr.partition(adapters)

    def temp(apply):
        def run(train, x):
            forms = lr.expand(lr.join(train, frozen))[PATH]
            base = jnp.zeros((layers, width, width))
            layer = lambda x, one: (jnp.tanh(x + apply(*one, x)), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(layer, x, (forms, base))[0] ** 2)

        return compile_report(jax.grad(run), [train, kernel(4, width)]).temp

    ours = temp(lambda form, base, x: form.apply(Call("dense", x, x @ base, base, jnp.matmul)))
    plain = temp(lambda form, base, x: x @ base + x @ form.delta(base))
    low_rank = temp(lambda form, base, x: x @ form.a @ form.b + form.sparse.values.sum())
    assert ours - low_rank < 6 * dense
    assert plain - low_rank > layers * dense


def test_a_weight_is_learnt_from_nothing():
    adapters = adapt(ZERO, lr.sltrain(rank=2, density=0.3))
    trained = list(training(adapters, ZERO, optax.adamw(3e-2), 150))[-1]
    train, frozen = lr.partition(trained)
    start = lr.partition(adapters)[0]
    assert loss(train, frozen, ZERO) < 0.05 * loss(start, frozen, ZERO)


@pytest.mark.parametrize("fields", [{"density": 0.0}, {"density": 1.1}, {"init": "zero"}, {"support": "random"}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"sltrain\\({next(iter(fields))}="):
        lr.sltrain(**fields)


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="sltrain at layer/kernel: density=0.001 of 600 entries is none"):
        adapt(ZERO, lr.sltrain(rank=2, density=0.001))
    with pytest.raises(ValueError, match="sltrain at layer/kernel: 4294967296 entries are too many"):
        lr.plan(params_of(jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)), {"layer/kernel": lr.sltrain()})
