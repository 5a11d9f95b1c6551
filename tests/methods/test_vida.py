"""ViDA: two branches and their scales, how a batch's uncertainty sets them, and that setting them edits nothing."""

import jax
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, params_of

import lowrank_jax as lr

LOW, HIGH = 2, 5
K = kernel(12, 10)


def vida(**fields):
    return lr.vida(**{"rank": LOW, "high_rank": HIGH, **fields})


def moved(weight=K):
    adapters = adapt(weight, vida())
    leaves = {n: x if n == "vida_scales" else kernel(*x.shape, seed=5) for n, x in adapters.sites[PATH].items()}
    return adapters.replace(sites={PATH: leaves})


@pytest.mark.parametrize(
    ("uncertainty", "low", "high"), [(0.3, 0.7, 1.3), (0.1, 1.1, 0.9), (0.2, 0.8, 1.2), (0.0, 1.0, 1.0)]
)
def test_an_unsure_batch_is_for_the_wide_branch(uncertainty, low, high):
    np.testing.assert_allclose(lr.vida_scales(uncertainty, threshold=0.2), (low, high), atol=1e-6)
    np.testing.assert_allclose(jax.jit(lr.vida_scales)(uncertainty, 0.2), (low, high), atol=1e-6)


def test_the_release_leaves_the_wide_branch_at_one():
    np.testing.assert_allclose(lr.vida_scales(0.3, 0.2, compat="official"), (0.7, 1.0), atol=1e-6)
    np.testing.assert_allclose(lr.vida_scales(0.1, 0.2, compat="official"), (1.1, 1.0), atol=1e-6)
    with pytest.raises(ValueError, match="vida_scales\\(compat='code'\\)"):
        lr.vida_scales(0.1, compat="code")


@pytest.mark.parametrize("shape", [(12, 10), (3, 12, 10)])
def test_each_scale_is_its_branchs(shape):
    weight = kernel(*shape)
    adapters = lr.with_vida_scales(moved(weight), *lr.vida_scales(0.3, 0.2))
    p = leaves_of(adapters)
    expected = 0.7 * p["low_a"] @ p["low_b"] + 1.3 * p["high_a"] @ p["high_b"]
    np.testing.assert_allclose(delta(adapters, weight), expected, atol=1e-4)
    one = 0.7 * p["low_a"] @ p["low_b"]
    without = lr.with_vida_scales(adapters, 0.7, 0)
    np.testing.assert_allclose(delta(without, weight), one, atol=1e-4)
    assert (np.linalg.matrix_rank(np.asarray(delta(without, weight)), tol=1e-4) == LOW).all()


def test_setting_scales_is_a_new_value():
    """Student and teacher are two values; setting the scales of one is not setting the other's, and the leaves are shared."""
    student = moved()
    before = jax.tree.map(np.array, student)
    teacher = jax.jit(lambda adapters, u: lr.with_vida_scales(adapters, *lr.vida_scales(u)))(student, 0.3)
    again = lr.with_vida_scales(student, 0.7, 1.3)
    assert again.sites[PATH]["low_a"] is student.sites[PATH]["low_a"]
    np.testing.assert_allclose(teacher.sites[PATH]["vida_scales"], [0.7, 1.3], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, student)
    assert teacher.plan == student.plan


def test_scales_are_frozen_and_the_branches_train():
    train, frozen = lr.partition(moved())
    assert set(train[PATH]) == {"low_a", "low_b", "high_a", "high_b"}
    assert set(frozen.sites[PATH]) == {"vida_scales"}
    with_scales = lr.with_vida_scales(frozen, 0.7, 1.3)  # inside a step, what is frozen can be set alone
    gradient = lambda scale: jax.grad(loss)(train, lr.with_vida_scales(frozen, scale, 0.0), K)[PATH]  # noqa: E731
    assert not np.asarray(gradient(1.0)["high_b"]).any() and np.asarray(gradient(1.0)["low_b"]).any()
    assert (delta(lr.join(train, with_scales), K) != delta(moved(), K)).any()


def test_every_adapter_of_a_stack_and_parts_of_a_chain_are_set():
    stacked = lr.with_vida_scales(lr.stack([moved(), moved()]), 0.7, 1.3)
    assert np.allclose(stacked.sites[PATH]["vida_scales"], [[0.7, 1.3]] * 2)
    both = lr.with_vida_scales(lr.add(moved(), adapt(K, lr.lora(2))), 0.7, 1.3)
    assert np.allclose(both.sites[PATH]["0.vida_scales"], [0.7, 1.3])
    assert not both.sites[PATH]["1.b"].any()


def test_without_a_site_there_is_nothing_to_set():
    with pytest.raises(ValueError, match="with_vida_scales: the plan has no site of vida \\(it has lora\\)"):
        lr.with_vida_scales(adapt(K, lr.lora(2)), 1, 1)


def test_merging_is_at_the_scales_it_has():
    adapters = lr.with_vida_scales(moved(), 0.7, 1.3)
    merged = lr.merge(params_of(K), adapters)["layer"]["kernel"]
    np.testing.assert_allclose(merged, K + delta(adapters, K), atol=1e-4)


def test_it_starts_as_the_release_does():
    p = leaves_of(adapt(kernel(400, 300), vida()))
    assert not p["low_b"].any() and not p["high_b"].any() and (p["vida_scales"] == 1).all()
    # 800 and 2000 draws: the standard error of a standard deviation is 1 / sqrt(2 n).
    assert abs(p["low_a"].std() * LOW**2 - 1) < 0.1 and abs(p["high_a"].std() * HIGH**2 - 1) < 0.07
    other = leaves_of(adapt(kernel(400, 300), vida(init="kaiming")))
    for name in ("low_a", "high_a"):
        assert 0.95 / 20 < np.abs(other[name]).max() <= 1 / 20
    assert (other["low_a"] != other["high_a"][:, :LOW]).any()


@pytest.mark.parametrize("fields", [{"init": "normal"}, {"dropout": 1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"vida\\({next(iter(fields))}="):
        vida(**fields)


def test_the_wide_branch_must_fit():
    with pytest.raises(ValueError, match="vida at layer/kernel: rank 11 is not between 1 and 10"):
        adapt(K, vida(high_rank=11))
