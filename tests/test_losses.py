"""Losses against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr


def test_symmetric_kl_is_the_mean_of_both_directions():
    a, b = (np.random.default_rng(n).standard_normal((4, 5)) * 3 for n in (0, 1))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = 0.5 * ((p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)).mean()
    np.testing.assert_allclose(lr.symmetric_kl(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)
    # What is aimed at is a constant: the gradient of cross entropy with soft targets, (p - q) / 2 over the batch.
    np.testing.assert_allclose(jax.grad(lr.symmetric_kl)(jnp.asarray(a), jnp.asarray(b)), (p - q) / 8, atol=1e-6)
    half = lr.symmetric_kl(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16))
    assert half.dtype == jnp.float32 and abs(half / expected - 1) < 0.02
