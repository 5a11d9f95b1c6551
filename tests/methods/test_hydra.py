"""Hydra: its sequential branch reads the weight's output with its bias; where its factors start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call

N_IN, N_OUT, SCALE = 12, 10, 3.0
K, BIAS, X = kernel(N_IN, N_OUT), 50 + kernel(N_OUT, seed=1), kernel(7, N_IN, seed=2)


def hydra(**fields):
    return lr.hydra(**{"rank": 2, "sequential_rank": 3, "scale": SCALE, **fields})


def trained(weight, only, **fields):
    """Random factors in one branch, zeros in the other."""
    adapters = adapt(weight, hydra(**fields))
    leaves = {
        name: kernel(*leaf.shape, seed=n) if name.startswith(only) else jnp.zeros_like(leaf)
        for n, (name, leaf) in enumerate(adapters.sites[PATH].items())
    }
    return adapters.replace(sites={PATH: leaves})


def output(adapters, weight, bias):
    call = Call("dense", X, X @ weight + bias, weight, jnp.matmul, None, bias)
    return np.asarray(lr.expand(adapters)[PATH].apply(call), np.float64)


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.parametrize("bias", [False, True])
def test_the_sequential_branch_sees_the_bias(bias):
    adapters = trained(K, "sequential", bias=bias)
    p, (x, k, b) = leaves_of(adapters), wide(X, K, BIAS)
    q = p["sequential_down"] @ p["sequential_up"]
    constant = p["sequential_down_bias"] @ p["sequential_up"] + p["sequential_up_bias"] if bias else 0
    right = x @ (k + SCALE * k @ q) + b + SCALE * (b @ q + constant)
    np.testing.assert_allclose(output(adapters, K, BIAS), right, rtol=0, atol=1e-5 * np.abs(right).max())
    # Reading x K without b would be far off: the bias is large.
    assert np.abs(SCALE * b @ q).max() > 0.5 * np.abs(right).max()


def test_merging_moves_the_bias():
    adapters = trained(K, "sequential", bias=True)
    params = params_of(K)
    params["layer"]["bias"] = BIAS
    merged = lr.merge(params, adapters)["layer"]
    got = np.asarray(X @ merged["kernel"] + merged["bias"], np.float64)
    np.testing.assert_allclose(got, output(adapters, K, BIAS), rtol=0, atol=1e-5 * np.abs(got).max())


def test_branches_do_not_see_each_other():
    """Both at once is the sum of each alone; one behind the other would multiply them."""
    one, two = trained(K, "parallel"), trained(K, "sequential")
    both = jax.tree.map(jnp.add, one, two)
    base = np.asarray(X @ K + BIAS, np.float64)
    total = output(one, K, BIAS) + output(two, K, BIAS) - base
    np.testing.assert_allclose(output(both, K, BIAS), total, rtol=0, atol=1e-5 * np.abs(total).max())


def test_only_the_parallel_branch_reaches_what_the_weight_forgets():
    """An input that the weight maps to zero stays there, whatever the sequential branch has learned."""
    weight = K.at[0].set(0.0)
    x = jnp.zeros((1, N_IN)).at[0, 0].set(1.0)
    call = Call("dense", x, x @ weight, weight, jnp.matmul)
    reached = {only: lr.expand(trained(weight, only))[PATH].apply(call) for only in ("parallel", "sequential")}
    assert not np.asarray(reached["sequential"]).any() and np.asarray(reached["parallel"]).all()


@pytest.mark.parametrize("init", ["xavier", "normal", "kaiming"])
def test_starts_at_the_base_with_a_random_input_side(init):
    p = leaves_of(adapt(kernel(300, 200), hydra(rank=8, sequential_rank=8, init=init, bias=True)))
    for name, n in (("parallel_down", 300), ("sequential_down", 200)):
        down = p.pop(name)
        if init == "normal":
            # The standard error of the deviation is 1.8% at most.
            assert abs(down.std() / 0.02 - 1) < 0.06
        else:
            bound = (6 / (n + 8)) ** 0.5 if init == "xavier" else n**-0.5
            assert 0.98 * bound < np.abs(down).max() <= bound
    assert not any(leaf.any() for leaf in p.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"sequential_rank": 0}, "rank=0"),
        ({"init": "zeros"}, r"hydra\(init='zeros'\): expected one of"),
        ({"dropout": 1.0}, r"hydra\(dropout=1.0\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        lr.hydra(**fields)


def test_a_bias_that_the_module_has_no_place_for_is_refused():
    with pytest.raises(ValueError, match="hydra adds a bias, and the module has none"):
        lr.merge(params_of(K), trained(K, "parallel", bias=True))
