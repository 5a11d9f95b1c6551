"""Conformer adapters: what they compute, and that time is the axis they look along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call, UnsupportedError

N_IN, N_OUT, WIDTH, TIME = 12, 10, 4, 9
K, BIAS, X = kernel(N_IN, N_OUT), kernel(N_OUT, seed=1), kernel(2, TIME, N_IN, seed=2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def moved(**fields):
    adapters = adapt(K, lr.conformer_adapter(width=WIDTH, **fields))
    leaves = {name: kernel(*leaf.shape, seed=n) for n, (name, leaf) in enumerate(adapters.sites[PATH].items())}
    return adapters.replace(sites={PATH: leaves})


def output(adapters, x):
    call = Call("dense", x, x @ K + BIAS, K, jnp.matmul, None, BIAS)
    return np.asarray(lr.expand(adapters)[PATH].apply(call), np.float64)


@pytest.mark.parametrize("kernel_size", [1, 4, 5])
@pytest.mark.parametrize("position", ["parallel", "sequential"])
def test_is_what_the_paper_writes(position, kernel_size):
    adapters = moved(position=position, kernel_size=kernel_size, scale=3.0)
    p, x = leaves_of(adapters), np.asarray(X, np.float64)
    base = x @ np.asarray(K, np.float64) + np.asarray(BIAS, np.float64)
    wide = (x if position == "parallel" else base) @ p["down"] + p["down_bias"]
    gated = wide[..., :WIDTH] * sigmoid(wide[..., WIDTH:])
    h = np.zeros_like(gated) + p["taps_bias"]
    for t in range(TIME):
        for tap in range(kernel_size):
            if 0 <= (source := t + tap - (kernel_size - 1) // 2) < TIME:
                h[:, t] += p["taps"][tap] * gated[:, source]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["gain"] + p["shift"]
    expected = base + 3 * ((h * sigmoid(h)) @ p["up"] + p["up_bias"])
    np.testing.assert_allclose(output(adapters, X), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_looks_along_time_within_its_filter_and_never_across_the_batch():
    adapters = moved(kernel_size=5)
    changed = output(adapters, X.at[0, 4].add(1.0)) != output(adapters, X)
    assert changed[0].any(-1).tolist() == [2 <= t <= 6 for t in range(TIME)] and not changed[1].any()


def test_every_leaf_learns_once_the_output_side_has_moved():
    adapters = adapt(K, lr.conformer_adapter(width=WIDTH))
    target = kernel(2, TIME, N_OUT, seed=3)

    def loss(leaves):
        call = Call("dense", X, X @ K + BIAS, K, jnp.matmul, None, BIAS)
        return jnp.sum((lr.expand(adapters.replace(sites={PATH: leaves}))[PATH].apply(call) - target) ** 2)

    leaves = adapters.sites[PATH]
    assert (output(adapters, X) == np.asarray(X @ K + BIAS)).all()
    first = jax.grad(loss)(leaves)
    assert {name for name, g in first.items() if np.asarray(g).any()} == {"up", "up_bias"}
    second = jax.grad(loss)(jax.tree.map(lambda x, g: x - 1e-3 * g, leaves, first))
    assert all(np.asarray(g).any() for g in second.values())


def test_starts_like_layers_do():
    p = leaves_of(adapt(kernel(300, 200), lr.conformer_adapter(width=50, kernel_size=16)))
    assert p["down"].shape == (200, 100) and 0.98 * 200**-0.5 < np.abs(p["down"]).max() <= 200**-0.5
    assert 0.98 * 0.25 < np.abs(p["taps"]).max() <= 0.25 and (p["gain"] == 1).all()
    assert not any(p[name].any() for name in ("up", "up_bias", "down_bias", "taps_bias", "shift"))


def test_an_input_without_time_is_refused():
    with pytest.raises(UnsupportedError, match=r"needs axes \[batch, time, features\], got 2 axes"):
        output(moved(), X[:, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 1}, "conformer_adapter at layer/kernel: a width of 1"),
        ({"width": 0}, r"conformer_adapter\(width=0\)"),
        ({"kernel_size": 0}, r"conformer_adapter\(kernel_size=0\)"),
        ({"position": "before"}, r"conformer_adapter\(position='before'\): expected one of"),
        ({"dropout": 1.0}, r"conformer_adapter\(dropout=1.0\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        lr.plan(params_of(K), {"layer": lr.conformer_adapter(**fields)})
