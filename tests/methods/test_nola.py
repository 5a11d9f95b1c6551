"""NOLA: coefficients of random matrices that are made again in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_seeded import numpy_fold, numpy_uniform
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, training

import lowrank_jax as lr
from lowrank_jax.forms import Call

K = kernel(12, 10)
RANK, BASES, SCALE = 4, 21, 0.5


def nola(weight=K, **fields):
    return adapt(weight, lr.nola(**{"rank": RANK, "bases": BASES, "alpha": RANK * SCALE, **fields}))


def moved(adapters, seed=0):
    random = np.random.default_rng(seed)
    new = {n: jnp.asarray(random.standard_normal(adapters.sites[PATH][n].shape), jnp.float32) for n in "uv"}
    return adapters.replace(sites={PATH: {**adapters.sites[PATH], **new}})


def bases(adapters):
    """``a0``, ``a_i`` and ``b_i``, all there at once."""
    seed = adapters.sites[PATH]["seed"]
    a0 = numpy_uniform(numpy_fold(seed, 0), (12, RANK)) / 12**0.5
    a = numpy_uniform(numpy_fold(seed, 1), (BASES, 12, RANK)) / BASES**0.5
    return a0, a, numpy_uniform(numpy_fold(seed, 2), (BASES, RANK, 10)) / BASES**0.5


def test_gradients_are_products_with_the_bases():
    """``dL/du_i = <dL/da, a_i>``: bases that the backward pass made of another seed, or in another order, would fail."""
    adapters = moved(nola())
    a0, a, b = bases(adapters)
    p = leaves_of(adapters)
    factors = a0 + np.tensordot(p["u"], a, 1), np.tensordot(p["v"], b, 1)
    x, target = np.float64(kernel(7, 12, seed=1)), np.float64(kernel(7, 10, seed=2))
    g = 2 * x.T @ (x @ (np.float64(K) + SCALE * factors[0] @ factors[1]) - target)
    expected = {
        "u": np.einsum("ir,kir->k", SCALE * g @ factors[1].T, a),
        "v": np.einsum("ro,kro->k", SCALE * factors[0].T @ g, b),
    }
    gradient = jax.grad(loss)(*lr.partition(adapters), K)[PATH]
    assert set(gradient) == {"u", "v"}
    for name, want in expected.items():
        np.testing.assert_allclose(gradient[name], want, atol=1e-5 * np.abs(want).max())


def test_the_start_is_no_saddle():
    """``u`` gets nothing at the first step because ``b`` is zero; ``v`` does because ``a0`` is not."""
    adapters = nola()
    assert not np.asarray(delta(adapters, K)).any()
    gradient = jax.grad(loss)(*lr.partition(adapters), K)[PATH]
    assert not np.asarray(gradient["u"]).any() and np.asarray(gradient["v"]).all()
    history = [leaves_of(a) for a in training(adapters, K, optax.adamw(1e-2), 3)]
    assert np.asarray(history[2]["u"]).all()
    assert all((p["seed"] == history[0]["seed"]).all() for p in history)


def test_every_weight_has_its_own_bases():
    adapters = moved(nola(kernel(3, 12, 10)))
    seeds = np.asarray(adapters.sites[PATH]["seed"])
    assert seeds.shape == (3, 2) and len(np.unique(seeds)) == 6
    one = jax.tree.map(lambda x: jnp.broadcast_to(x[0], x.shape), adapters.sites[PATH])
    same = {**one, "seed": adapters.sites[PATH]["seed"]}
    updates = np.asarray(delta(adapters.replace(sites={PATH: same}), kernel(3, 12, 10)))
    assert abs(np.corrcoef(updates.reshape(3, -1)) - np.eye(3)).max() < 0.5


def test_the_count_depends_on_the_bases_only():
    counts = {
        adapt(kernel(*shape), lr.nola(rank=rank, bases=7)).plan.trainable
        for shape in ((12, 10), (40, 30))
        for rank in (1, 9)
    }
    assert counts == {14}


def test_neither_bases_nor_a_dense_update_is_ever_whole():
    """One 1024 x 1024 weight, rank 8, 512 bases: the bases are 32 MiB, a dense update is 4 MiB."""
    weight, x = jnp.zeros((1024, 1024)), jnp.zeros((16, 1024))
    train, frozen = lr.partition(adapt(weight, lr.nola(rank=8, bases=512)))

    def factored(train):
        form = lr.expand(lr.join(train, frozen))[PATH]
        return (form.apply(Call("dense", x, jnp.zeros_like(x), weight, jnp.matmul)) ** 2).sum()

    def densely(train):
        return ((x @ lr.expand(lr.join(train, frozen))[PATH].delta(weight)) ** 2).sum()

    temporary = [
        jax.jit(jax.grad(f)).lower(train).compile().memory_analysis().temp_size_in_bytes for f in (factored, densely)
    ]
    assert temporary[0] < 2 * 2**20 < 4 * 2**20 < temporary[1]


@pytest.mark.parametrize("fields", [{"rank": 0}, {"bases": 0}, {"dropout": 1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        lr.nola(**fields)
