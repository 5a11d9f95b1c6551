"""ZeroI2V: its adapters vanish into the weight, biases included, from either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call, UnsupportedError

N_IN, N_OUT, SCALE = 12, 8, 3.0
K, BIAS, X = kernel(N_IN, N_OUT), kernel(N_OUT, seed=1), kernel(7, N_IN, seed=2)
PARAMS = {"layer": {"kernel": K, "bias": BIAS}}
PLACES = {"before": N_IN, "after": N_OUT}


def trained(position, **fields):
    adapters = adapt(K, lr.zero_i2v(position, scale=SCALE, **fields))
    leaves = {name: kernel(*leaf.shape, seed=n) for n, (name, leaf) in enumerate(adapters.sites[PATH].items())}
    return adapters.replace(sites={PATH: leaves})


def output(adapters, rng=None):
    call = Call("dense", X, X @ K + BIAS, K, jnp.matmul, rng, BIAS)
    return np.asarray(lr.expand(adapters)[PATH].apply(call), np.float64)


def adapter(p, u):
    return u + SCALE * ((u @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"])


@pytest.mark.parametrize("position", PLACES)
def test_acts_where_it_stands_and_merges_to_the_same(position):
    adapters = trained(position)
    p, x, k, b = leaves_of(adapters), *(np.asarray(a, np.float64) for a in (X, K, BIAS))
    right = adapter(p, x) @ k + b if position == "before" else adapter(p, x @ k + b)
    np.testing.assert_allclose(output(adapters), right, rtol=0, atol=1e-5 * np.abs(right).max())
    merged = lr.merge(PARAMS, adapters)["layer"]
    got = np.asarray(X @ merged["kernel"] + merged["bias"], np.float64)
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_both_sides_of_one_weight():
    """Added in the order of the forward pass they are ``M_1 K M_2``; in the other the second could not see the first."""
    before, after = trained("before"), trained("after")
    both = lr.add(before, after)
    p, q = leaves_of(before), leaves_of(after)
    x, k, b = (np.asarray(a, np.float64) for a in (X, K, BIAS))
    right = adapter(q, adapter(p, x) @ k + b)
    merged = lr.merge(PARAMS, both)["layer"]
    for got in (output(both), np.asarray(X @ merged["kernel"] + merged["bias"], np.float64)):
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-5 * np.abs(right).max())
    with pytest.raises(UnsupportedError, match="zero_i2v reads the weight it acts on, so it has to come first"):
        lr.add(after, before)
    with pytest.raises(UnsupportedError, match="has to come first"):
        lr.add(after, both)


@pytest.mark.parametrize(("position", "n"), PLACES.items())
def test_starts_as_the_identity(position, n):
    adapters = adapt(K, lr.zero_i2v(position))
    p = leaves_of(adapters)
    assert {name: leaf.shape for name, leaf in p.items()} == {
        "down": (n, n // 4), "down_bias": (n // 4,), "up": (n // 4, n), "up_bias": (n,),
    }  # fmt: skip
    assert not p["up"].any() and not p["up_bias"].any()
    assert p["down"].any() and p["down_bias"].any() and np.abs(p["down"]).max() <= n**-0.5
    assert (output(adapters) == np.asarray(X @ K + BIAS)).all()


def test_dropout_is_between_the_products():
    adapters = trained("before", dropout=0.5, width=1)
    dropped, whole = output(adapters, jax.random.key(0)), output(adapters)
    p, k = leaves_of(adapters), np.asarray(K, np.float64)
    rest = np.asarray(X, np.float64) @ k + np.asarray(BIAS) + SCALE * p["up_bias"] @ k
    for row in range(len(X)):  # width 1: a row keeps all of the product, doubled, or nothing of it
        assert any(np.allclose(dropped[row] - rest[row], f * (whole[row] - rest[row]), atol=1e-3) for f in (0, 2))


def test_without_biases_it_merges_into_a_weight_without_one():
    merged = lr.merge(params_of(K), trained("before", bias=False))
    assert merged["layer"]["kernel"].shape == K.shape
    with pytest.raises(UnsupportedError, match="zero_i2v adds a bias, and the module has none"):
        lr.merge(params_of(K), trained("before"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "parallel"}, r"zero_i2v\(position='parallel'\): expected one of"),
        ({"width": 0}, r"zero_i2v\(width=0\)"),
        ({"reduction": -1}, r"zero_i2v\(reduction=-1\)"),
        ({"dropout": 1.5}, r"zero_i2v\(dropout=1.5\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        lr.zero_i2v(**fields)


def test_only_dense_weights_have_a_front():
    site = {"conv": lr.Site("conv", "conv", (3, 4, 5), "float32", (), (0, 1), (2,))}
    with pytest.raises(ValueError, match="zero_i2v applies to dense weights only"):
        lr.plan({"conv": jnp.zeros((3, 4, 5))}, {"conv": lr.zero_i2v("before")}, sites=site)
