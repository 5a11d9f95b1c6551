"""Bottleneck adapters: why they may not start at zero, what they compute, their widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call

N_IN, N_OUT = 12, 10
K, BIAS, X = kernel(N_IN, N_OUT), kernel(N_OUT, seed=1), kernel(7, N_IN, seed=2)
CALL = Call("dense", X, X @ K + BIAS, K, jnp.matmul, None, BIAS)


def gradients(leaves, adapters):
    def loss(leaves):
        form = lr.expand(adapters.replace(sites={PATH: leaves}))[PATH]
        return jnp.sum((form.apply(CALL) - kernel(7, N_OUT, seed=3)) ** 2)

    return jax.grad(loss)(leaves)


@pytest.mark.parametrize("position", ["parallel", "sequential"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh", None])
def test_both_weights_learn_from_the_first_step(position, activation):
    adapters = adapt(K, lr.bottleneck(width=4, position=position, activation=activation))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradients(adapters.sites[PATH], adapters)))
    # The control: what the release writes down, all zeros, is stuck for ever.
    stuck = gradients(jax.tree.map(jnp.zeros_like, adapters.sites[PATH]), adapters)
    assert not np.asarray(stuck["down"]).any() and not np.asarray(stuck["up"]).any()


@pytest.mark.parametrize("position", ["parallel", "sequential"])
def test_is_what_the_paper_writes(position):
    adapters = adapt(K, lr.bottleneck(width=4, position=position, activation="relu", scale=3.0))
    leaves = {n: kernel(*leaf.shape, seed=9) for n, leaf in adapters.sites[PATH].items()}
    adapters = adapters.replace(sites={PATH: leaves})
    p, x, z = leaves_of(adapters), np.asarray(X, np.float64), np.asarray(CALL.y, np.float64)
    hidden = np.maximum((x if position == "parallel" else z) @ p["down"] + p["down_bias"], 0)
    expected = z + 3 * (hidden @ p["up"] + p["up_bias"])
    got = lr.expand(adapters)[PATH].apply(CALL)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("position", "n"), [("parallel", 300), ("sequential", 200)])
def test_the_width_is_the_rounded_quotient_of_what_it_reads(position, n):
    site = lr.plan(params_of(kernel(300, 200)), {"layer": lr.bottleneck(reduction=3, position=position)}).entries[0]
    assert {name: leaf.shape for name, leaf in site.leaves.items()} == {
        "down": (n, round(n / 3)), "up": (round(n / 3), 200), "down_bias": (round(n / 3),), "up_bias": (200,),
    }  # fmt: skip


def test_gaussian_starts_near_the_base_and_zero_up_at_it():
    weight = kernel(300, 200)
    p = leaves_of(adapt(weight, lr.bottleneck(width=40)))
    for name in ("down", "up"):
        assert abs(p[name].std() / 0.02 - 1) < 0.05  # 8000 draws: a standard error of 0.8%
    assert not p["down_bias"].any() and not p["up_bias"].any()
    assert np.abs(np.corrcoef(p["down"].ravel(), p["up"].T.ravel())[0, 1]) < 0.05
    p = leaves_of(adapt(weight, lr.bottleneck(width=40, init="zero_up")))
    assert 0.98 * 200**-0.5 < np.abs(p["down"]).max() <= 200**-0.5
    assert not any(p[name].any() for name in ("up", "down_bias", "up_bias"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, r"bottleneck\(width=0\)"),
        ({"reduction": 0}, r"bottleneck\(reduction=0\)"),
        ({"activation": "mish"}, r"bottleneck\(activation='mish'\): expected one of"),
        ({"position": "before"}, r"bottleneck\(position='before'\): expected one of"),
        ({"init": "zeros"}, r"bottleneck\(init='zeros'\): expected one of"),
        ({"dropout": -0.1}, r"bottleneck\(dropout=-0.1\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        lr.bottleneck(**fields)


def test_a_reduction_that_leaves_nothing_names_the_site():
    with pytest.raises(ValueError, match="bottleneck at layer/kernel: reduction=64 of 10 features leaves a width of 0"):
        lr.plan(params_of(K), {"layer": lr.bottleneck(reduction=64)})


def test_a_nonlinear_adapter_is_not_merged():
    with pytest.raises(ValueError, match="'gelu' is not a linear update"):
        lr.merge(params_of(K), adapt(K, lr.bottleneck(width=2)))
