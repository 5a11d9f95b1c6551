"""DyLoRA: one rank a step for the whole model, what of it trains, and any rank afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of

import lowrank_jax as lr

R, ALPHA = 8, 16.0
PARAMS = {"one": {"kernel": kernel(12, 10)}, "two": {"kernel": kernel(2, 9, 11), "bias": jnp.zeros((2, 11))}}


def made(**fields):
    """An adapter far from init on two weights, one of them a stack."""
    plan = lr.plan(PARAMS, {".*kernel": lr.dylora(**{"rank": R, "alpha": ALPHA, **fields})})
    adapters = lr.init(jax.random.key(0), PARAMS, plan)
    return jax.tree.map(lambda x: x + 0.3 * kernel(*x.shape, seed=x.ndim), adapters)


def drawn(key, form):
    """The rank of a step, from the form that it made."""
    return int((np.asarray(form.mid).reshape(-1, R)[0] != 0).sum())


def test_the_truncated_product_is_scaled_by_its_own_rank():
    """At rank 2 of 8 the factor over a plain ``alpha / 8 * a[:, :2] b[:2]`` is 4."""
    adapters = made()
    p = {path: {n: np.asarray(x, np.float64) for n, x in leaves.items()} for path, leaves in adapters.sites.items()}
    for q in range(1, R + 1):
        key = next(k for k in map(jax.random.key, range(200)) if drawn(k, lr.expand(adapters, k)["one/kernel"]) == q)
        for forms in (
            lr.expand(adapters, key),
            lr.expand(lr.at_rank(adapters, q)),
            lr.expand(lr.compact(lr.at_rank(adapters, q))),
        ):
            for path, form in forms.items():
                plain = ALPHA / R * p[path]["a"][..., :q] @ p[path]["b"][..., :q, :]
                got = np.asarray(form.delta(None), np.float64)
                np.testing.assert_allclose(got, R / q * plain, rtol=0, atol=1e-5)
    assert drawn(key, lr.expand(adapters, key)["one/kernel"]) == R


def test_one_draw_for_all_sites_uniform_over_ranks():
    adapters = made()
    forms = jax.jit(lr.expand)
    counts = np.zeros(R + 1, int)
    for n in range(400):
        ranks = {drawn(None, form) for form in forms(adapters, jax.random.key(n)).values()}
        counts[ranks.pop()] += 1
        assert not ranks
    assert forms._cache_size() == 1
    assert counts[0] == 0 and counts[1:].min() >= 28 and counts.max() <= 76  # 50 +- 4 deviations


@pytest.mark.parametrize("frozen", [True, False])
def test_only_the_directions_of_a_step_move(frozen):
    """Masked gradients alone would not do: momentum and decay move every direction."""
    adapters = made(frozen=frozen)
    tx = lr.optim.with_methods(optax.adamw(1e-2, b1=0.9, weight_decay=0.1), adapters.plan, 40)
    train, frozen_part = lr.partition(adapters)

    def loss(train, key):
        forms = lr.expand(lr.join(train, frozen_part), key)
        return sum(jnp.sum((form.delta(None) - 1) ** 2) for form in forms.values())

    @jax.jit
    def step(train, state, key):
        gradients = jax.grad(loss)(train, key)
        updates, state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), state, gradients

    state, seen = tx.init(train), set()
    for n in range(40):
        key = jax.random.key(n)
        q = drawn(key, lr.expand(adapters, key)["one/kernel"])
        seen.add(q)
        expected = (np.arange(R) == q - 1) if frozen else (np.arange(R) < q)
        new, state, gradients = step(train, state, key)
        for path in train:
            for changed in (gradients[path], jax.tree.map(lambda a, b: a != b, new[path], train[path])):
                a, b = (np.asarray(changed[name]) != 0 for name in "ab")
                assert a.any(-2).reshape(-1, R).all(0).tolist() == expected.tolist()
                assert a.any(-2).reshape(-1, R).any(0).tolist() == expected.tolist()
                assert b.any(-1).reshape(-1, R).any(0).tolist() == expected.tolist()
        train = new
    assert seen == set(range(1, R + 1))


def test_a_chosen_rank_loses_nothing():
    adapters = made()
    low = lr.at_rank(adapters, 2)
    assert low.plan != adapters.plan and lr.at_rank(low, None).plan == adapters.plan
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), lr.at_rank(low, 5).sites, adapters.sites))
    small = lr.compact(low)
    assert {e.method for e in small.plan.entries} == {lr.lora(rank=2, alpha=ALPHA)}
    assert small.plan.trainable == 2 * 22 + 2 * 2 * 20
    smaller = lr.compact(lr.at_rank(adapters, 1))
    for path, leaves in small.sites.items():
        np.testing.assert_array_equal(leaves["a"][..., :1], smaller.sites[path]["a"])


def test_init_changes_nothing_at_any_rank():
    adapters = adapt(kernel(300, 200), lr.dylora(rank=R, alpha=ALPHA))
    assert 0.95 / np.sqrt(300) < np.abs(leaves_of(adapters)["a"]).max() <= 1 / np.sqrt(300)
    for q in range(1, R + 1):
        assert not np.asarray(delta(lr.at_rank(adapters, q), kernel(300, 200))).any()
    for n in range(5):
        assert not np.asarray(lr.expand(adapters, jax.random.key(n))[PATH].delta(None)).any()


def test_bad_ranks_are_refused():
    with pytest.raises(ValueError, match=r"dylora\(at=9\): expected a rank between 1 and 8"):
        lr.at_rank(made(), 9)
    with pytest.raises(ValueError, match=r"dylora\(dropout="):
        lr.dylora(dropout=1.0)
    plain = adapt(kernel(12, 10), lr.lora(rank=2))
    with pytest.raises(ValueError, match=r"no site of dylora \(it has lora\)"):
        lr.at_rank(plain, 1)
