"""ALLoRA: its gradients against float64, on every kind of call; what they must not depend on; what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.forms import AdaptiveLowRank, Call, LowRank

N_IN, N_OUT, RANK, ETA = 12, 10, 3, 2.0
K, A, B = kernel(N_IN, N_OUT), kernel(N_IN, RANK, seed=5), kernel(RANK, N_OUT, seed=6)
FORM = AdaptiveLowRank(LowRank(A, B), eta=ETA)
X, IDS, IMAGE = kernel(7, N_IN, seed=1), jnp.array([[0, 5, 2], [2, 11, 1]]), kernel(2, 7, 6, seed=8)
PATCHES = lambda x: jnp.concatenate([x[:, :-1], x[:, 1:]], -1)  # noqa: E731

# How each kind of call multiplies: its input (a convolution has a window of 2 over 6 channels), and ``(input, weight) -> output``.
CALLS = {
    "dense": (X, jnp.matmul),
    "embed": (IDS, lambda ids, w: w[ids]),
    "conv": (IMAGE, lambda x, w: PATCHES(x) @ w),
    "attend": (kernel(7, N_OUT, seed=3), lambda x, w: x @ w.T),
}


def call_of(kind, x):
    linear = CALLS[kind][1]
    if kind == "attend":
        return Call("dense", x, linear(x, K), K.T, jnp.matmul)
    return Call(kind, x, linear(x, K), K, linear)


def run(form, kind, x):
    return (form.transpose() if kind == "attend" else form).apply(call_of(kind, x))


def loss(y):
    return jnp.sum(y * jnp.sin(kernel(*y.shape, seed=4) + y))


def rates(a, b):
    return 1 / np.sqrt(np.linalg.norm(a @ b, axis=0) + 1 / ETA**2)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", CALLS)
def test_each_output_teaches_the_factors_at_its_own_rate(kind):
    x, linear = CALLS[kind]
    got = jax.grad(lambda form: loss(run(form, kind, x)))(FORM).low
    a, b = np.asarray(A, np.float64), np.asarray(B, np.float64)
    of_weight = np.asarray(jax.grad(lambda w: loss(linear(x, w)))(K + A @ B), np.float64) * rates(a, b)
    close(got.a, of_weight @ b.T)
    close(got.b, a.T @ of_weight)


@pytest.mark.parametrize("kind", ["dense", "conv", "attend"])
def test_output_and_the_gradient_of_the_input_are_a_loras(kind):
    x = CALLS[kind][0]
    of = lambda form: jax.value_and_grad(lambda x: loss(run(form, kind, x)))(x)  # noqa: E731
    (value, gradient), (plain_value, plain_gradient) = of(FORM), of(FORM.low)
    assert abs(value - plain_value) <= 1e-6 * abs(plain_value)
    close(gradient, plain_gradient)


def test_rates_are_of_the_product_not_of_the_factors():
    """(10 a) (b / 10) is the same update, so the same rates: gradients change only as the factors' own do."""
    other = AdaptiveLowRank(LowRank(10 * A, B / 10), eta=ETA)
    one, two = (jax.grad(lambda form: loss(run(form, "dense", X)))(form).low for form in (FORM, other))
    close(two.a, one.a / 10)
    close(two.b, 10 * one.b)


def test_at_first_it_is_a_lora_with_eta_for_a_learning_rate():
    adapters = adapt(K, lr.allora(rank=RANK, eta=ETA))
    form = lr.expand(adapters)[PATH]
    got = jax.grad(lambda form: loss(run(form, "dense", X)))(form).low
    plain = jax.grad(lambda form: loss(run(form, "dense", X)))(form.low)
    close(got.b, ETA * plain.b)
    assert not got.a.any() and not plain.a.any()
    assert not np.asarray(delta(adapters, K)).any()


def test_rates_fall_as_an_output_grows():
    one = lambda size: np.asarray(  # noqa: E731
        jax.grad(lambda form: run(form, "dense", X).sum())(AdaptiveLowRank(LowRank(A, size * B), eta=ETA)).low.b
    )
    ratios = [one(size) / one(0.0) for size in (0.0, 0.1, 1.0, 10.0)]
    assert all((later < earlier).all() for earlier, later in zip(ratios, ratios[1:], strict=False))


def test_it_costs_a_lora_on_the_way_forward():
    dots = lambda form: jax.jit(lambda form, x: run(form, "dense", x)).lower(form, X).compile().as_text().count(" dot(")  # noqa: E731
    assert dots(FORM) == dots(FORM.low) > 0


def test_merging_needs_no_scale():
    adapters = adapt(K, lr.allora(rank=RANK, eta=ETA)).replace(sites={PATH: {"a": A, "b": B}})
    close(lr.merge(params_of(K), adapters)["layer"]["kernel"], K + A @ B)


def test_it_starts_as_a_lora():
    weight = kernel(400, 300)
    assert np.abs(leaves_of(adapt(weight, lr.allora(rank=RANK)))["a"]).max() <= 1 / 20
    # 1200 draws: the standard error of the standard deviation is 2%.
    assert abs(leaves_of(adapt(weight, lr.allora(rank=RANK, init="gaussian")))["a"].std() * RANK - 1) < 0.1
    assert adapt(kernel(2, N_IN, N_OUT), lr.allora(rank=(1, 3))).plan.trainable == 4 * (N_IN + N_OUT)


@pytest.mark.parametrize("fields", [{"init": "svd"}, {"eta": 0.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"allora\\({next(iter(fields))}="):
        lr.allora(**fields)
