"""Truncated decompositions against NumPy's exact ones, on the spectra that kernels have and on hostile ones."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import linalg

KEY = jax.random.key(0)


def with_spectrum(s: np.ndarray, m: int, n: int, seed: int = 0) -> np.ndarray:
    """A matrix with random singular directions and the given singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(d, len(s))))[0] for d in (m, n))
    return ((u * s) @ v.T).astype(np.float32)


# What trained kernels look like: a few strong directions, then a long power-law tail; and both extremes.
SPECTRA = {
    "trained": lambda d: 1 / np.sqrt(1 + np.arange(d)) + 0.1,
    "geometric": lambda d: 0.8 ** np.arange(d),
    "flat": lambda d: np.ones(d),
    "gaussian": lambda d: np.linalg.svd(np.random.default_rng(3).normal(size=(d, d)), compute_uv=False),
    "ill-conditioned": lambda d: np.logspace(0, -12, d),
    "low rank": lambda d: (np.arange(d) < 5).astype(float),
}
SHAPES = [(128, 128), (96, 200), (200, 96)]


@pytest.mark.parametrize("method", ["randomized", "exact"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_orthonormal_and_as_good_as_exact(spectrum, shape, method):
    rank = 12
    w = with_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    u, s, vt = map(np.asarray, linalg.svd(jnp.asarray(w), rank, key=KEY, method=method))
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(rank), atol=1e-5)
    assert (np.diff(s) <= 0).all()
    exact = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    best = np.sum(exact[:rank] ** 2)
    assert 0.99 * best <= np.sum(s.astype(np.float64) ** 2) <= (1 + 1e-5) * best
    # The factors reconstruct what the singular values say they hold: no triplet is mismatched.
    residual = np.sum((w - (u * s) @ vt).astype(np.float64) ** 2)
    np.testing.assert_allclose(
        residual, np.sum(exact**2) - np.sum(s.astype(np.float64) ** 2), atol=1e-5 * np.sum(exact**2)
    )


@pytest.mark.parametrize("scale", [1.0, -1e-22, 1e22])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_directions_hold_what_the_exact_ones_do(spectrum, shape, scale):
    rank, w = 12, with_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    q = np.asarray(linalg.directions(KEY, jnp.asarray(w) * scale, rank))
    np.testing.assert_allclose(q.T @ q, np.eye(rank), atol=1e-5)
    held = np.sum((q.T @ w).astype(np.float64) ** 2)
    best = np.sum(np.linalg.svd(w.astype(np.float64), compute_uv=False)[:rank] ** 2)
    assert 0.99 * best <= held <= (1 + 1e-5) * best


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_are_the_singular_vectors_where_those_are_apart(shape):
    """Stacked kernels, each its own; signs too, as moments are kept over a refresh."""
    w = np.stack([with_spectrum(0.6 ** np.arange(40), *shape, seed=n) for n in range(3)])
    found = np.asarray(linalg.directions(KEY, jnp.asarray(w), 5))
    want = np.linalg.svd(w.astype(np.float64))[0][..., :5]
    largest = np.take_along_axis(want, np.abs(want).argmax(-2, keepdims=True), -2)
    np.testing.assert_allclose(found, want * np.sign(largest), atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, -1e-22, 1e22])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_orthonormal_columns_span_the_same(spectrum, scale):
    w = with_spectrum(SPECTRA[spectrum](40), 150, 40)
    q = np.asarray(linalg.orthonormal(jnp.asarray(w) * scale))
    np.testing.assert_allclose(q.T @ q, np.eye(40), atol=1e-5)
    np.testing.assert_allclose(q @ (q.T @ w), w, atol=1e-4)


@pytest.mark.parametrize("deficient", ["zero", "one column zero", "columns equal", "square of rank 1"])
def test_orthonormal_whatever_the_rank(deficient):
    x = np.array(np.random.default_rng(0).normal(size=(2, 8, 8) if deficient.startswith("square") else (2, 30, 8)), "f")
    if deficient == "one column zero":
        x[:, :, 3] = 0
    else:
        x[0] = {
            "zero": 0 * x[0],
            "columns equal": x[0, :, :1] + 0 * x[0],
            "square of rank 1": np.outer(x[0, 0], x[0, 1]),
        }[deficient]
    q = np.asarray(linalg.orthonormal(jnp.asarray(x)))
    np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, np.stack([np.eye(8)] * 2), atol=1e-5)
    np.testing.assert_allclose(q @ (np.swapaxes(q, -1, -2) @ x), x, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3, 60, 136])
@pytest.mark.parametrize("m", [136, 600])
def test_many_columns_of_little_rank(m, rank):
    """Gram matrices that rounding makes indefinite."""
    random = np.random.default_rng(rank)
    x = np.stack([random.normal(size=(m, rank)) @ random.normal(size=(rank, 136)) for _ in range(20)]).astype("f")
    x[10:, :, ::3] = 0
    for q in (
        linalg.orthonormal(jnp.asarray(x)),
        linalg.directions(KEY, jnp.asarray(x), 120),
        linalg.left_singular_vectors(jnp.asarray(x), 120),
    ):
        gram = np.swapaxes(q, -1, -2) @ np.asarray(q)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(q.shape[-1]), gram.shape), atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_separated_directions_are_found_to_rounding(shape):
    s = np.concatenate([np.array([9.0, 7.0, 5.0, 4.0]), np.full(60, 0.5)])
    w = with_spectrum(s, *shape)
    u, sigma, vt = map(np.asarray, linalg.svd(jnp.asarray(w), 4, key=KEY))
    u0, _, vt0 = np.linalg.svd(w.astype(np.float64))
    np.testing.assert_allclose(sigma, s[:4], rtol=1e-5)
    cosines = [np.linalg.svd(u0[:, :4].T @ u, compute_uv=False), np.linalg.svd(vt0[:4] @ vt.T, compute_uv=False)]
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


def test_signs_do_not_depend_on_the_method_or_the_key():
    w = jnp.asarray(with_spectrum(2.0 ** -np.arange(40), 64, 48))
    want = linalg.svd(w, 6, method="exact")
    assert (jnp.take_along_axis(want[0], jnp.argmax(jnp.abs(want[0]), 0, keepdims=True), 0) > 0).all()
    for seed in range(3):
        got = linalg.svd(w, 6, key=jax.random.key(seed))
        for g, e in zip(got, want, strict=True):
            np.testing.assert_allclose(g, e, atol=1e-4)
    np.testing.assert_array_equal(linalg.svd(w, 6, key=KEY)[0], linalg.svd(w, 6, key=KEY)[0])


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_a_batch_equals_its_matrices(method):
    w = jax.random.normal(jax.random.key(1), (2, 3, 40, 56))
    batched = linalg.svd(w, 4, key=KEY, method=method)
    assert [leaf.shape for leaf in batched] == [(2, 3, 40, 4), (2, 3, 4), (2, 3, 4, 56)]
    for i in np.ndindex(2, 3):
        for b, one in zip(batched, linalg.svd(w[i], 4, key=KEY, method=method), strict=True):
            np.testing.assert_allclose(b[i], one, atol=2e-4)


def test_jit_and_eval_shape():
    w = jax.random.normal(jax.random.key(1), (3, 64, 80))
    decompose = lambda w: linalg.svd(w, 4, key=KEY)  # noqa: E731
    shapes = jax.eval_shape(decompose, w)
    for got, eager, shape in zip(jax.jit(decompose)(w), decompose(w), shapes, strict=True):
        assert (got.shape, got.dtype) == (shape.shape, shape.dtype)
        np.testing.assert_allclose(got, eager, atol=1e-4)


def test_bfloat16_is_decomposed_in_float32():
    w = jnp.asarray(with_spectrum(SPECTRA["geometric"](64), 64, 64)).astype(jnp.bfloat16)
    got = linalg.svd(w, 6, key=KEY)
    for g, e in zip(got, linalg.svd(w.astype(jnp.float32), 6, key=KEY), strict=True):
        assert g.dtype == jnp.float32
        np.testing.assert_array_equal(g, e)
    assert linalg.range_finder(KEY, w, 6).dtype == linalg.spectrum(w).dtype == jnp.float32


def test_zero_matrix():
    u, s, vt = linalg.svd(jnp.zeros((64, 64)), 3, key=KEY)
    assert (s == 0).all()
    assert jnp.isfinite(u).all() and jnp.isfinite(vt).all()
    assert linalg.captured_energy(jnp.zeros((2, 8, 8)), 3).tolist() == [1.0, 1.0]


def test_range_finder_is_an_orthonormal_basis_of_the_requested_width():
    w = jax.random.normal(jax.random.key(1), (2, 50, 70))
    q = linalg.range_finder(KEY, w, 6, oversample=4)
    assert q.shape == (2, 50, 10)
    np.testing.assert_allclose(jnp.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(10), (2, 10, 10)), atol=1e-5)
    assert linalg.range_finder(KEY, w, 48, oversample=20).shape == (2, 50, 50)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectrum(shape):
    w = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    np.testing.assert_allclose(linalg.spectrum(jnp.asarray(w)), np.linalg.svd(w, compute_uv=False), rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, -1e-22, 1e22])
def test_captured_energy_ignores_the_scale(scale):
    s = SPECTRA["trained"](64)
    w = jnp.asarray(with_spectrum(s, 64, 64)) * scale
    want = np.sum(s[:8] ** 2) / np.sum(s**2)
    np.testing.assert_allclose(linalg.captured_energy(w, 8), want, rtol=1e-5)
    sketched = float(linalg.captured_energy(w, 8, key=KEY, method="randomized"))
    assert 0.99 * want <= sketched <= 1.00001 * want


def test_captured_energy_tells_a_flat_spectrum_from_a_concentrated_one():
    w = jnp.stack([jnp.asarray(with_spectrum(SPECTRA[name](64), 64, 64)) for name in ("geometric", "flat")])
    concentrated, flat = linalg.captured_energy(w, 8)
    np.testing.assert_allclose([concentrated, flat], [1 - 0.8**16, 8 / 64], rtol=1e-4)


@pytest.mark.parametrize("call", [
    lambda w, r: linalg.svd(w, r, key=KEY),
    lambda w, r: linalg.range_finder(KEY, w, r),
    lambda w, r: linalg.directions(KEY, w, r),
    linalg.captured_energy,
], ids=["svd", "range_finder", "directions", "captured_energy"])  # fmt: skip
@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_out_of_range(call, rank):
    with pytest.raises(ValueError, match=rf"Rank {rank} is out of range .*expected 1 to 8"):
        call(jnp.ones((12, 8)), rank)


def test_other_bad_arguments():
    w = jnp.ones((8, 8))
    with pytest.raises(ValueError, match="needs a key"):
        linalg.svd(w, 2)
    with pytest.raises(ValueError, match="Unknown svd method 'lanczos'"):
        linalg.svd(w, 2, key=KEY, method="lanczos")
    with pytest.raises(ValueError, match="A matrix of 4 rows has at most 4 orthonormal columns, not 8"):
        linalg.orthonormal(w[:4])
    with pytest.raises(ValueError, match="Expected a matrix"):
        linalg.svd(jnp.ones(8), 2, key=KEY)


AT_ONCE = """
import jax, jax.numpy as jnp
from lowrank_jax import linalg

stacks = [jax.random.normal(jax.random.key(n), (6, 96, 24)) for n in range(16)]
both = jax.jit(lambda stacks: [(linalg.qr(x), linalg.svd(x, 4, method="exact")) for x in stacks])
for _ in range(10):
    jax.block_until_ready(both(stacks))
print("done")
"""


def test_decompositions_of_many_stacks_at_once_finish():
    """In a process of its own: batched LAPACK calls that run at the same time may wait for each other forever."""
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
