"""RandomBases: a few bases at a time act like all at once, made of a seed like given, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import seeded
from lowrank_jax.forms import Call, Entries, RandomBases

N, R, D, M, TOKENS = 5, 3, 14, 12, 6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def form(side="out", **fields):
    seed = jnp.array([7, 8], jnp.uint32)
    return RandomBases(normal(N, R), normal(N, M, seed=1), seed, d=D, side=side, **fields)


def matrices(**fields):
    """The form's matrices, all of them."""
    ones = form(**fields).replace(lam=jnp.ones((N, R)), gam=jnp.ones((N, M))).as_low_rank()
    return np.asarray(ones.a, np.float64).reshape(D, N, R), np.asarray(ones.b, np.float64).reshape(N, R, M)[0]


def output(form, x):
    n_out = form.gam.shape[-1] if form.side == "out" else form.d
    call = Call("dense", x, jnp.ones((*x.shape[:-1], n_out)), jnp.zeros((x.shape[-1], n_out)), jnp.matmul)
    return form.apply(call)


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("at_once", [1, 6, 9, 99])
def test_it_is_the_sum(side, at_once):
    one = form(side, at_once=at_once, scale=0.5)
    wide, narrow = matrices()
    lam, gam = np.asarray(one.lam, np.float64), np.asarray(one.gam, np.float64)
    expected = 0.5 * sum(wide[:, j] @ np.diag(lam[j]) @ narrow @ np.diag(gam[j]) for j in range(N))
    expected = expected if side == "out" else expected.T
    np.testing.assert_allclose(one.delta(jnp.zeros(expected.shape)), expected, atol=1e-5)
    np.testing.assert_allclose(one.transpose().delta(jnp.zeros(expected.T.shape)), expected.T, atol=1e-5)
    np.testing.assert_allclose(one.as_low_rank().delta(jnp.zeros(expected.shape)), expected, atol=1e-5)
    x = normal(TOKENS, expected.shape[0], seed=3)
    np.testing.assert_allclose(output(one, x) - 1, x @ expected, atol=1e-4)

    def loss(how):
        return jax.grad(lambda lam, gam, x: (how(lam, gam, x) ** 2).sum(), argnums=(0, 1, 2))(one.lam, one.gam, x)

    def densely(lam, gam, x):
        delta = 0.5 * jnp.einsum("dnr,nr,rm,nm->dm", wide, lam, narrow, gam)
        return 1 + x @ (delta if side == "out" else delta.T)

    factored = loss(lambda lam, gam, x: output(one.replace(lam=lam, gam=gam), x))
    for got, want in zip(factored, loss(densely), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("at_once", [6, 99])
def test_given_matrices_act_like_the_seeds(at_once):
    wide, narrow = matrices()
    seeds = form(at_once=at_once)
    given = seeds.replace(seed=None, wide=jnp.asarray(wide, jnp.float32), narrow=jnp.asarray(narrow, jnp.float32))
    x = normal(TOKENS, D, seed=3)
    np.testing.assert_allclose(output(given, x), output(seeds, x), atol=1e-5)


def test_sparse_entries():
    wide, narrow = matrices(entries=Entries(2.0, 3.0, density=0.25))
    assert set(np.unique(wide)) == {-2.0, 0.0, 2.0} and set(np.unique(narrow)) == {-3.0, 0.0, 3.0}
    share = np.abs(np.asarray(seeded.uniform(form().seed, (10**5,)))) < 0.25
    assert abs(share.mean() - 0.25) < 0.01


@pytest.mark.parametrize("at_once", [6, 99])
def test_bfloat16_rounds_once_whatever_the_parts(at_once):
    x = normal(TOKENS, D, seed=3).astype(jnp.bfloat16)
    one = form(at_once=at_once)
    got = output(one, x)
    wanted = output(one, x.astype(jnp.float32))
    assert got.dtype == jnp.float32  # the call's own output decides
    assert np.abs(got - wanted).max() < 2.0**-6 * np.abs(wanted).max()
