"""Sparse: what its backward pass keeps, and how it accumulates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kernel

from lowrank_jax.forms import Call, Sparse
from lowrank_jax.memory import compile_report

LAYERS, WIDTH, NNZ, TOKENS = 16, 256, 500, 32
DENSE = 4 * WIDTH * WIDTH


def sparse(call, indices, values):
    return Sparse(indices, values, shape=(WIDTH, WIDTH)).apply(call)


def plain(call, indices, values):
    """The control: the same product as JAX differentiates it."""
    return call.y + call.x @ Sparse(indices, values, shape=(WIDTH, WIDTH)).delta(call.kernel).astype(call.y.dtype)


def loss(values, indices, kernels, x, adapt):
    def layer(x, one):
        indices, values, weight = one
        return jnp.tanh(adapt(Call("dense", x, x @ weight, weight, jnp.matmul), indices, values)), None

    return jnp.sum(jax.lax.scan(layer, x, (indices, values, kernels))[0].astype(jnp.float32) ** 2)


def arguments():
    random = np.random.default_rng(0)
    indices = np.stack([random.choice(WIDTH * WIDTH, NNZ, replace=False) for _ in range(LAYERS)])
    weights = kernel(LAYERS, WIDTH, WIDTH) / WIDTH**0.5
    return 0.1 * kernel(LAYERS, NNZ), jnp.asarray(indices, jnp.int32), weights, kernel(TOKENS, WIDTH)


def test_no_dense_matrix_outlives_its_layer():
    def temp(adapt):
        return compile_report(jax.grad(lambda *a: loss(*a, adapt)), arguments()).temp

    base = temp(lambda call, indices, values: call.y + values.sum() * 0)
    assert temp(sparse) - base < 6 * DENSE
    assert temp(plain) - base > LAYERS * DENSE


def test_the_gradient_is_the_gathered_product():
    for one, two in zip(
        *(jax.grad(loss, argnums=(0, 3))(*arguments(), adapt) for adapt in (sparse, plain)), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(two).max())
    values, indices, _, x = (a[0] if a.ndim > 2 or a.shape[0] == LAYERS else a for a in arguments())
    g = kernel(TOKENS, WIDTH, seed=9)
    call = Call("dense", x, jnp.zeros_like(g), jnp.zeros((WIDTH, WIDTH)), jnp.matmul)
    got = jax.grad(lambda v: jnp.vdot(sparse(call, indices, v), g))(values)
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    np.testing.assert_allclose(got, exact.reshape(-1)[indices], atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("adapt", [sparse, plain])
def test_the_gradient_of_a_bfloat16_model_is_not_rounded(adapt):
    values, indices, weights, x = arguments()
    x, ones = x.astype(jnp.bfloat16), jnp.ones((TOKENS, WIDTH), jnp.bfloat16)
    call = Call("dense", x, jnp.zeros_like(ones), weights[0].astype(jnp.bfloat16), jnp.matmul)
    got = jax.grad(lambda v: jnp.sum((adapt(call, indices[0], v) * ones).astype(jnp.float32)))(values[0])
    exact = np.asarray(x, np.float64).sum(0)[indices[0] // WIDTH]
    error = np.abs(got - exact).max() / np.abs(exact).max()
    assert error < 1e-6 if adapt is sparse else error > 1e-4  # plain: rounded to bfloat16 before it is gathered
