"""LoRA-XS: a small core between frozen singular directions."""

import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, training

import lowrank_jax as lr

K = kernel(12, 10)
U, SIGMA, VT = np.linalg.svd(np.asarray(K, np.float64), full_matrices=False)
RANK = 4


def test_singular_values_sit_on_the_input_side():
    p = leaves_of(adapt(K, lr.lora_xs(RANK, svd="exact")))
    np.testing.assert_allclose((p["a"] ** 2).sum(), (SIGMA[:RANK] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(p["a"].T @ p["a"], np.diag(SIGMA[:RANK] ** 2), atol=1e-4)
    np.testing.assert_allclose(p["b"] @ p["b"].T, np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(p["a"] @ p["b"], (U[:, :RANK] * SIGMA[:RANK]) @ VT[:RANK], atol=1e-4)


def test_the_update_stays_in_the_principal_spaces():
    adapters = adapt(K, lr.lora_xs(RANK, alpha=8.0, svd="exact"))
    trained = list(training(adapters, K, optax.adamw(1e-1), 5))[-1]
    change, p = np.asarray(delta(trained, K), np.float64), leaves_of(trained)
    size = np.linalg.norm(change, 2)
    assert size > 0.1
    assert np.abs(change - U[:, :RANK] @ (U[:, :RANK].T @ change)).max() < 1e-5 * size
    assert np.abs(change - (change @ VT[:RANK].T) @ VT[:RANK]).max() < 1e-5 * size
    assert size <= 2 * SIGMA[0] * np.linalg.norm(p["m"], 2) * (1 + 1e-5)


@pytest.mark.parametrize("std", [1e-5, 1e-2])
def test_the_core_starts_near_zero(std):
    adapters = adapt(kernel(80, 70), lr.lora_xs(32, init_std=std))
    m = leaves_of(adapters)["m"]
    assert 0.9 * std < m.std() < 1.1 * std and abs(m.mean()) < 0.1 * std


def test_the_count_does_not_depend_on_the_weight():
    assert [adapt(kernel(n, 9), lr.lora_xs(RANK)).plan.trainable for n in (8, 20)] == [RANK**2] * 2
    assert set(lr.partition(adapt(K, lr.lora_xs(RANK)))[0][PATH]) == {"m"}


def test_a_bad_svd_is_refused():
    with pytest.raises(ValueError, match=r"lora_xs\(svd='fast'\)"):
        lr.lora_xs(4, svd="fast")
