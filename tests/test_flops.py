"""FLOPs of products, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import flops

X, W = jnp.ones((4, 8)), jnp.ones((8, 6))
ONE = 2 * 4 * 8 * 6


def _ragged(x, w):
    return jax.lax.ragged_dot(x, jnp.stack([w] * 3), jnp.array([1, 1, 2]))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x @ w, ONE),
        (lambda x, w: jax.jit(jax.checkpoint(lambda: x @ w))(), ONE),
        (lambda x, w: jax.vmap(lambda row: row @ w)(jnp.stack([x, x])), 2 * ONE),
        (lambda x, w: jax.lax.scan(lambda c, _: (c, x @ w), 0, None, length=5), 5 * ONE),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) + (x @ w)), 2 * ONE),
        (lambda x, w: jnp.exp(x), 0),
        (_ragged, ONE),
        (lambda x, w: jax.lax.conv(jnp.ones((1, 3, 10, 10)), jnp.ones((5, 3, 2, 2)), (1, 1), "SAME"), 2 * 5 * 100 * 3 * 4),
        (lambda x, w: jax.grad(lambda w: (x @ w).sum())(w), 2 * ONE),
    ],
)  # fmt: skip
def test_products_are_counted(function, expected):
    assert flops.count(function, X, W) == expected


def test_remat_computes_again_and_the_backward_of_activations_costs_what_the_forward_does():
    def loss(x, policy):
        f = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w), policy=policy)
        return f(x).sum()

    x = w = jnp.ones((8, 8))
    one = 2 * 8**3
    policies = jax.checkpoint_policies
    kept = flops.count(jax.grad(lambda x: loss(x, policies.everything_saveable)), x)
    again = flops.count(jax.grad(lambda x: loss(x, policies.nothing_saveable)), x)
    assert (kept, again) == (4 * one, 6 * one)
