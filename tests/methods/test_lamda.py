"""LaMDA: what its factors are at init, how its rows freeze, ranks that differ within a stack."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, params_of, training

import lowrank_jax as lr
from lowrank_jax.optim.freeze_rows import frozen_rows

K = kernel(12, 10)
U, SIGMA, VT = np.linalg.svd(np.asarray(K, np.float64), full_matrices=False)
RANK, SCALE = 4, 2.0


def lamda(**fields):
    return lr.lamda(**{"rank": RANK, "alpha": RANK * SCALE, "svd": "exact", **fields})


def adamw():
    return optax.adamw(3e-2, b1=0.9, weight_decay=0.1)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("core", ["identity", "balanced", "sigma"])
def test_singular_values_sit_where_the_core_says(core):
    p = leaves_of(adapt(K, lamda(core=core)))
    sigma = np.diag(SIGMA[:RANK])
    in_a, in_m, in_b = {"identity": (0, 0, 1), "balanced": (0.5, 0, 0.5), "sigma": (0, 1, 0)}[core]
    close(p["a"].T @ p["a"], sigma ** (2 * in_a) if in_a else np.eye(RANK))
    close(SCALE * p["m"], np.diag(SIGMA[:RANK] ** in_m))
    close(p["b"] @ p["b"].T, np.diag(SIGMA[:RANK] ** (2 * in_b)))
    close(SCALE * p["a"] @ p["m"] @ p["b"], (U[:, :RANK] * SIGMA[:RANK]) @ VT[:RANK])


def test_the_folded_base_is_the_residual():
    adapters = adapt(K, lamda())
    folded, moved = lr.fold(params_of(K), adapters)
    residual = np.asarray(folded["layer"]["kernel"], np.float64)
    close(np.linalg.norm(residual, 2), SIGMA[RANK])
    close(residual + np.asarray(delta(moved, K)), K)


def test_randomised_and_exact_start_alike():
    one, two = (adapt(kernel(64, 48), lamda(svd=svd)) for svd in ("randomized", "exact"))
    assert not np.asarray(delta(one, K)).any() and not np.asarray(delta(two, K)).any()
    product = lambda p: p["a"] @ p["m"] @ p["b"]  # noqa: E731
    close(product(leaves_of(one)), product(leaves_of(two)), atol=3e-2)


def test_svd_zero_leaves_the_base_alone():
    adapters = adapt(K, lamda(init="svd_zero"))
    p = leaves_of(adapters)
    assert set(p) == {"a", "m", "b"} and not p["m"].any()
    close(p["a"].T @ p["a"], np.eye(RANK))
    close(p["b"] @ p["b"].T, np.eye(RANK))
    folded, _ = lr.fold(params_of(K), adapters)
    assert folded["layer"]["kernel"] is K


def test_official_code_starts_without_an_svd():
    weight = kernel(300, 200)
    adapters = adapt(weight, lamda(init="official_code"))
    p = leaves_of(adapters)
    assert not p["b"].any()
    for factor, bound in ((p["a"], 300**-0.5), (p["m"], RANK**-0.5)):
        assert 0.8 * bound < np.abs(factor).max() <= bound
        assert abs(factor.mean()) < 0.3 * bound
    other = leaves_of(lr.init(jax.random.key(4), params_of(2 * weight), adapters.plan))
    assert (other["a"] != p["a"]).any()
    train, frozen = lr.partition(adapters)
    gradient = jax.grad(loss)(train, frozen, weight)[PATH]
    # With b = 0 the core gets nothing at the first step; from svd_residual everything does at once.
    assert not np.asarray(gradient["m"]).any() and np.asarray(gradient["b"]).any()
    train, frozen = lr.partition(adapt(weight, lamda()))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(jax.grad(loss)(train, frozen, weight)))


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("init", ["svd_residual", "svd_zero", "official_code"])
def test_frozen_rows_keep_their_bits_under_adamw(order, init):
    total, freeze = 20, 0.5
    adapters = adapt(K, lamda(freeze=freeze, order=order, init=init))
    tx = lr.optim.with_methods(adamw(), adapters.plan, total)
    history = [a.sites[PATH] for a in training(adapters, K, tx, total)]
    for step, (before, after) in enumerate(zip(history, history[1:], strict=False)):
        moved = np.asarray(before["b"] != after["b"]).any(-1)
        frozen = min(RANK, RANK * step // 10)
        expected = np.arange(RANK) >= frozen if order == "descending" else np.arange(RANK) < RANK - frozen
        assert moved.tolist() == expected.tolist(), step
        assert np.asarray(before["m"] != after["m"]).any() or (init == "official_code" and step == 0)
        assert (np.asarray(before["a"]) == np.asarray(after["a"])).all()
    assert (np.asarray(history[0]["a"]) == np.asarray(history[-1]["a"])).all()


def test_masking_gradients_instead_would_not_freeze():
    """The control: the same rows without gradient still move, by momentum and by decay."""
    total = 20
    adapters = adapt(K, lamda(freeze=0.5))
    only_mask = lr.optim.with_methods(optax.identity(), adapters.plan, total)
    history = [a.sites[PATH]["b"] for a in training(adapters, K, optax.chain(only_mask, adamw()), total, steps=10)]
    assert np.asarray(history[8] != history[7])[: RANK * 7 // 10].any(-1).all()


def test_the_last_phase_trains_the_core_only():
    total = 20
    adapters = adapt(K, lamda(freeze=0.5))
    assert adapters.plan.phases(total) == (0, 10)
    assert set(lr.partition(adapters, 9, total)[0][PATH]) == {"m", "b"}
    assert set(lr.partition(adapters, 10, total)[0][PATH]) == {"m"}
    tx = lr.optim.with_methods(adamw(), adapters.plan, total)
    train, _ = lr.partition(adapters, 10, total)
    state = lr.optim.carry_state(tx, tx.init(lr.partition(adapters, 0, total)[0]), train)
    assert not any(leaf.shape == (RANK, 10) for leaf in jax.tree.leaves(state)), "moments of b are still there"
    assert [adapters.plan.count(step, total) for step in (0, 9, 10, 19)] == [RANK**2 + RANK * 10] * 2 + [RANK**2] * 2


@pytest.mark.parametrize(("freeze", "phases", "first"), [(0.0, (0,), {"m"}), (1.0, (0,), {"m", "b"})])
def test_the_ends_of_the_schedule(freeze, phases, first):
    adapters = adapt(K, lamda(freeze=freeze))
    assert adapters.plan.phases(10) == phases
    assert set(lr.partition(adapters, 0, 10)[0][PATH]) == first


@pytest.mark.parametrize(
    ("rank", "total", "freeze"), [(4, 20, "0.5"), (64, 1000, "0.3"), (32, 999, "0.3"), (7, 50, "0.1"), (3, 3000, "1")]
)
def test_schedule_is_the_formula(rank, total, freeze):
    exact = [min(rank, int(rank * step / (Fraction(freeze) * total))) for step in range(total)]
    got = np.asarray(frozen_rows(jnp.arange(total), rank, float(freeze) * total))
    assert got.tolist() == exact
    assert got[0] == 0 and (np.diff(got) >= 0).all()
    assert int(frozen_rows(math.ceil(float(freeze) * total), rank, float(freeze) * total)) == rank


def test_ranks_of_a_stack_leave_their_padding_at_zero():
    weight, ranks, total = kernel(3, 12, 10), (2, 4, 1), 12
    adapters = adapt(weight, lamda(rank=ranks, alpha=8, freeze=0.5))
    assert adapters.plan.trainable == sum(r * r + r * 10 for r in ranks)
    assert adapters.plan.count(11, 12) == sum(r * r for r in ranks)
    tx = lr.optim.with_methods(adamw(), adapters.plan, total)
    history = list(training(adapters, weight, tx, total))
    for step, now in enumerate(history):
        p = leaves_of(now)
        for layer, r in enumerate(ranks):
            assert not p["a"][layer, :, r:].any() and not p["b"][layer, r:].any()
            assert not p["m"][layer, r:].any() and not p["m"][layer, :, r:].any()
            if step:
                frozen = min(r, r * (step - 1) // 6)
                moved = (leaves_of(history[step - 1])["b"] != p["b"])[layer, :r].any(-1)
                assert moved.tolist() == (np.arange(r) >= frozen).tolist()
    for layer, r in enumerate(ranks):
        assert np.linalg.matrix_rank(np.asarray(delta(history[-1], weight))[layer], tol=1e-4) == r


@pytest.mark.parametrize(
    "fields",
    [{"init": "svd"}, {"core": "sigmas"}, {"order": "down"}, {"svd": "full"}, {"freeze": 1.5}, {"dropout": 1.0}],
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"lamda\\({next(iter(fields))}="):
        lr.lamda(**fields)


def test_ranks_must_fit_the_stack():
    with pytest.raises(ValueError, match="lamda at layer/kernel: 2 ranks for a stack of 3"):
        adapt(kernel(3, 12, 10), lamda(rank=(1, 2)))
    with pytest.raises(ValueError, match="lamda at layer/kernel: rank 11 is not between 1 and 10"):
        adapt(kernel(3, 12, 10), lamda(rank=(1, 2, 11)))
