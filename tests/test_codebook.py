"""The codebook of a normal: medians of cells, straight-through gradients, packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kernel
from scipy.stats import norm

from lowrank_jax.codebook import levels, pack, packed_size, quantise, unpack

W = kernel(40, 30) * 0.3 + 1.7


def test_one_bit_is_the_median_rule():
    """0.6745, the median of half a normal; 0.7979, its mean, would have the smallest squared error."""
    np.testing.assert_allclose(levels(1)[0], [-norm.ppf(0.75), norm.ppf(0.75)], atol=1e-7)
    w = np.asarray(W, np.float64)
    size = np.abs(np.asarray(quantise(W, 1)) - w.mean()) / w.std(ddof=1)
    np.testing.assert_allclose(size, 0.67449, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_are_medians_of_their_cells(bits):
    codes, edges = (x.astype(np.float64) for x in levels(bits))
    assert len(codes) == 2**bits and (np.diff(codes) > 0).all() and (codes == -codes[::-1]).all()
    np.testing.assert_allclose(edges, (codes[1:] + codes[:-1]) / 2, atol=1e-7)
    mass = norm.cdf([-np.inf, *edges, np.inf])
    # The alternation converges slowly in many cells; up to four bits it is there.
    np.testing.assert_allclose(norm.cdf(codes), (mass[1:] + mass[:-1]) / 2, atol=1e-6 if bits <= 4 else 1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_values_are_few_and_the_same_for_scaled_and_shifted_matrices(bits):
    quantised = np.asarray(quantise(W, bits), np.float64)
    found = len(np.unique(quantised))
    assert found == 2**bits if bits < 8 else 100 < found <= 2**bits  # 1200 numbers do not reach every outer cell
    np.testing.assert_allclose(quantise(-3 * W + 5, bits), -3 * quantised + 5, atol=1e-4)
    if bits == 8:
        assert np.abs(quantised - W).mean() < 0.01 * W.std()


def test_a_boundary_is_no_level_of_its_own():
    values = set(np.asarray(quantise(jnp.array([[-1.0, 0.0, 1.0]]), 1)).ravel().tolist())
    assert len(values) == 2


@pytest.mark.parametrize("bits", [1, 3])
def test_the_gradient_passes_the_code_and_follows_mean_and_deviation(bits):
    g = np.asarray(kernel(40, 30, seed=4), np.float64)
    got = jax.grad(lambda w: jnp.vdot(quantise(w, bits), g))(W)
    w, n = np.asarray(W, np.float64), W.size
    mean, sd = w.mean(), w.std(ddof=1)
    u = (w - mean) / (sd + 1e-5)
    q = (np.asarray(quantise(W, bits), np.float64) - mean) / sd
    d_sd = (w - mean) / ((n - 1) * sd)
    # w~ = z sd + mean with dz = d((w - mean) / (sd + eps)) and z worth q.
    through_z = (g - g.mean()) * sd / (sd + 1e-5) - (g * u).sum() * sd / (sd + 1e-5) * d_sd
    expected = through_z + (g * q).sum() * d_sd + g.mean()
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(expected - g).max() > 1e-2  # what an estimator would give that stops at the whole of Q


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_exact_and_dense(bits):
    w = kernel(3, 5, 7)
    packed, moments = pack(w, bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, packed_size(35, bits)) == (3, -(-35 * bits // 8))
    assert (unpack(packed, moments, (5, 7), bits) == quantise(w, bits)).all()
    assert (pack(w[1], bits)[0] == packed[1]).all()


def test_the_format_of_packed_codes():
    assert np.asarray(pack(jnp.array([[3.0, -1, -2, 4, -1, -1, -1, 5, 6]]), 1)[0]).tolist() == [0b10010001, 0b10000000]
