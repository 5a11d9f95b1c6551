"""DoRA: lengths and directions of columns, what the backward pass takes for a constant, where dropout acts, agreement with PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call, LowRank, Magnitude

N_IN, N_OUT, RANK, SCALE = 12, 10, 3, 2.0
K, X, G, BIAS = kernel(N_IN, N_OUT), kernel(7, N_IN, seed=1), kernel(7, N_OUT, seed=2), kernel(N_OUT, seed=3)


def dora(**fields):
    return lr.dora(**{"rank": RANK, "alpha": RANK * SCALE, **fields})


def moved(method=None, weight=K):
    """An adapter with every leaf far from its start."""
    adapters = adapt(weight, dora() if method is None else method)
    moved = {n: x + 0.3 * kernel(*x.shape, seed=5 + k) for k, (n, x) in enumerate(sorted(adapters.sites[PATH].items()))}
    return adapters.replace(sites={PATH: moved})


def output(adapters, x, weight=K, rng=None):
    form = lr.expand(adapters)[PATH]
    return form.apply(Call("dense", x, x @ weight + BIAS, weight, jnp.matmul, rng, BIAS))


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


def test_columns_have_the_length_of_their_magnitude_and_the_direction_of_the_sum():
    adapters, p = moved(), leaves_of(moved())
    weight = np.asarray(K + delta(adapters, K), np.float64)
    close(np.linalg.norm(weight, axis=0), np.abs(p["magnitude"]))
    direction = np.asarray(K, np.float64) + SCALE * p["a"] @ p["b"]
    close(weight / p["magnitude"], direction / np.linalg.norm(direction, axis=0))


def test_the_bias_is_not_scaled():
    adapters = moved()
    close(output(adapters, jnp.zeros((1, N_IN))), BIAS[None])
    close(output(adapters, X), X @ (K + delta(adapters, K)) + BIAS)


@pytest.mark.parametrize("norm", ["constant", "differentiated"])
def test_gradients(norm):
    """Against the paper's formulas in float64: as if ||W|| were a number, or with its own derivative (equation 6)."""
    adapters = moved(dora(norm=norm))
    train, frozen = lr.partition(adapters)
    got = jax.grad(lambda train: jnp.sum(G * output(lr.join(train, frozen), X)))(train)[PATH]
    p, w, x, g = leaves_of(adapters), *(np.asarray(z, np.float64) for z in (K, X, G))
    weight = w + SCALE * p["a"] @ p["b"]
    norms = np.linalg.norm(weight, axis=0)
    of_merged = x.T @ g
    along = (of_merged * weight).sum(0) / norms
    of_weight = of_merged * p["magnitude"] / norms
    if norm == "differentiated":
        of_weight = of_weight - weight / norms * along * p["magnitude"] / norms
    close(got["magnitude"], along)
    close(got["a"], SCALE * of_weight @ p["b"].T)
    close(got["b"], SCALE * p["a"].T @ of_weight)


def test_it_starts_at_the_lengths_of_the_weight():
    p = leaves_of(adapt(K, dora()))
    close(p["magnitude"], np.linalg.norm(np.asarray(K, np.float64), axis=0), 1e-6)
    assert not p["b"].any() and 0.8 / N_IN**0.5 < np.abs(p["a"]).max() <= 1 / N_IN**0.5
    gaussian = leaves_of(adapt(kernel(300, 200), dora(init="gaussian")))["a"]
    assert abs(gaussian.std() * RANK - 1) < 0.1


@pytest.mark.parametrize("method", [lr.dora(2), lr.ia3()], ids=str)
def test_what_multiplies_the_weight_is_stored_in_float32(method):
    """A bfloat16 adapter still starts at the base: 1 and the lengths are not rounded."""
    adapters = lr.init(jax.random.key(0), params_of(K), lr.plan(params_of(K), {"layer": method}), dtype=jnp.bfloat16)
    close(K + delta(adapters, K), K, 1e-6)
    assert {x.dtype for n, x in adapters.sites[PATH].items() if n not in "ab"} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("shape", [(N_IN, N_OUT), (2, N_IN, N_OUT)])
def test_magnitude_zero_takes_the_length_as_it_is(shape):
    adapters = moved(weight=kernel(*shape))
    leaves = {**adapters.sites[PATH], "magnitude": jnp.zeros_like(adapters.sites[PATH]["magnitude"])}
    low = SCALE * leaves["a"] @ leaves["b"]
    close(delta(adapters.replace(sites={PATH: leaves}), kernel(*shape)), low)


def test_other_layers_stay_the_base():
    weight = kernel(3, N_IN, N_OUT)
    adapters = moved(lr.on_layers(dora(), [1]), weight)
    change = np.asarray(delta(adapters, weight))
    assert not change[[0, 2]].any() and change[1].any()
    form = lr.expand(adapters)[PATH]
    for layer in (0, 2):
        one = jax.tree.map(lambda x, layer=layer: x[layer], form)
        y = X @ weight[layer] + BIAS
        assert (one.apply(Call("dense", X, y, weight[layer], jnp.matmul, None, BIAS)) == y).all()


def test_a_column_of_zeros_is_no_division_by_zero():
    weight = K.at[:, 0].set(0)
    train, frozen = lr.partition(adapt(weight, dora()))
    loss = lambda train: jnp.sum(G * output(lr.join(train, frozen), X, weight))  # noqa: E731
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss(train), jax.grad(loss)(train))))


def test_only_the_path_of_the_lora_drops():
    method = dora(dropout=0.5)
    at_start = adapt(K, method)
    close(output(at_start, X, rng=jax.random.key(0)), X @ K + BIAS)
    adapters = moved(method)
    with_dropout = output(adapters, X, rng=jax.random.key(0))
    assert (with_dropout != output(adapters, X)).any()
    many = jax.vmap(lambda key: output(adapters, X, rng=key))(jax.random.split(jax.random.key(1), 4000))
    error = np.asarray(many).std(0) / np.sqrt(4000)
    assert (np.abs(np.asarray(many).mean(0) - np.asarray(output(adapters, X))) < 5 * error + 1e-5).all()


def test_no_matrix_of_the_weights_shape_is_made_from_the_factors():
    """The trick of the form: the update itself never appears, forward or backward."""
    form = lr.expand(moved())[PATH]
    run = lambda form, x: form.apply(Call("dense", x, x @ K, K, jnp.matmul)).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(run))(form, X)
    shapes = [v.aval.shape for e in program.eqns if e.primitive.name == "dot_general" for v in e.outvars]
    assert (N_IN, N_OUT) not in shapes and (N_OUT, N_IN) not in shapes


def test_a_small_change_of_length_survives_bfloat16():
    """A factor of 1.001 rounds to 1 in bfloat16; its effect on the output must not."""
    low = LowRank(jnp.zeros((N_IN, 1)), jnp.zeros((1, N_OUT)))
    norms = jnp.linalg.norm(K, axis=0)
    one, two = (Magnitude(low, norms * factor) for factor in (1.0, 1.001))
    x = X.astype(jnp.bfloat16)
    y = jnp.zeros((7, N_OUT), jnp.bfloat16)  # the base's output out of the way: what is left is the change
    call = Call("dense", x, y, K.astype(jnp.bfloat16), jnp.matmul, None, -(x[0] @ K).astype(jnp.bfloat16))
    change = two.apply(call)[0].astype(jnp.float32) - one.apply(call)[0].astype(jnp.float32)
    np.testing.assert_allclose(change, 1e-3 * np.asarray(x[0] @ K, np.float32), rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("fields", [{"init": "svd"}, {"norm": "none"}, {"dropout": 1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"dora\\({next(iter(fields))}="):
        dora(**fields)


def test_ranks_must_fit_the_stack():
    with pytest.raises(ValueError, match="dora at layer/kernel: 2 ranks for a stack of 3"):
        adapt(kernel(3, N_IN, N_OUT), dora(rank=(1, 2), alpha=None))
    adapters = adapt(kernel(3, N_IN, N_OUT), dora(rank=(1, 2, 3), alpha=None))
    assert adapters.plan.trainable == 6 * (N_IN + N_OUT) + 3 * N_OUT
    with pytest.raises(lr.forms.UnsupportedError, match="dora reads the weight"):
        lr.add(adapt(K, lr.lora(2)), adapt(K, dora()))
    assert lr.merge(params_of(K), lr.add(adapt(K, dora()), adapt(K, lr.lora(2)))) is not None
