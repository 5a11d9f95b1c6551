"""PiSSA: principal directions train, the residual stays."""

import jax
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, params_of, training

import lowrank_jax as lr

K = kernel(12, 10)
U, SIGMA, VT = np.linalg.svd(np.asarray(K, np.float64), full_matrices=False)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("alpha", [None, 2.0, 12.0])
def test_the_scale_is_divided_out_once(alpha):
    """With alpha != r the factors' product times s is still the principal part, so residual plus update is the weight."""
    rank, scale = 4, 1.0 if alpha is None else alpha / 4
    adapters = adapt(K, lr.pissa(rank, alpha, svd="exact"))
    p = leaves_of(adapters)
    close(scale * p["a"] @ p["b"], (U[:, :rank] * SIGMA[:rank]) @ VT[:rank])
    close(p["a"].T @ p["a"], np.diag(SIGMA[:rank] / scale))
    close(p["b"] @ p["b"].T, np.diag(SIGMA[:rank] / scale))
    folded, moved = lr.fold(params_of(K), adapters)
    residual = np.asarray(folded["layer"]["kernel"], np.float64)
    close(np.linalg.norm(residual, 2), SIGMA[rank])
    close(residual + np.asarray(delta(moved, K)), K)
    gradient = jax.grad(loss)(*lr.partition(adapters), K)[PATH]
    assert set(gradient) == {"a", "b"} and all(np.asarray(g).any() for g in gradient.values())


def test_an_approximate_decomposition_still_starts_at_the_base():
    weight = kernel(64, 48)
    adapters = adapt(weight, lr.pissa(4, 8, svd="randomized"))
    folded, moved = lr.fold(params_of(weight), adapters)
    close(np.asarray(folded["layer"]["kernel"]) + np.asarray(delta(moved, weight)), weight)
    assert np.abs(np.asarray(delta(adapters, weight))).max() < 1e-5


def test_the_update_on_the_original_weight_has_twice_the_rank():
    """What is shipped: [a, a0] and [b; -b0] on the base as it was published."""
    adapters = list(training(adapt(K, lr.pissa(3, 6)), K, optax.adamw(1e-1), 5))[-1]
    form, p = lr.expand(adapters)[PATH].as_low_rank(), leaves_of(adapters)
    assert form.a.shape == (12, 6) and form.b.shape == (6, 10)
    expected = 2 * (p["a"] @ p["b"] - p["a0"] @ p["b0"])
    close(delta(adapters, K), expected)
    assert np.linalg.matrix_rank(expected, tol=1e-4) == 6
    close(lr.merge(params_of(K), adapters)["layer"]["kernel"], np.asarray(K) + expected)


def test_a_bad_svd_is_refused():
    with pytest.raises(ValueError, match=r"pissa\(svd='fast'\): expected one of 'randomized', 'exact'"):
        lr.pissa(4, svd="fast")
