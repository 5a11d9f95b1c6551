"""SpIEL-MA: SM3 on sparse entries, and swaps inside the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, params_of

import lowrank_jax as lr
from lowrank_jax.memory import compile_report
from lowrank_jax.optim import scale_by_spiel

K = kernel(12, 10)


def spiel(weight=K, **fields):
    return adapt(weight, lr.spiel(**{"density": 0.25, **fields}))


def flat(leaves, n_out=10):
    return (np.asarray(leaves["row"]) * n_out + np.asarray(leaves["column"])).astype(int)


def with_values(adapters):
    p = adapters.sites[PATH]
    return adapters.replace(sites={PATH: {**p, "v": kernel(*p["v"].shape, seed=5)}})


def stepper(adapters, tx, total=10):
    """``(adapters, gradient of v) ->`` the adapters after one update of a run that begins."""
    tx = lr.optim.with_methods(tx, adapters.plan, total)
    update, state = jax.jit(tx.update), tx.init(lr.partition(adapters)[0])

    def step(adapters, gradient):
        train, frozen = lr.partition(adapters)
        g = {PATH: {**jax.tree.map(jnp.zeros_like, train[PATH]), "v": gradient}}
        return lr.join(optax.apply_updates(train, update(g, state, train)[0]), frozen)

    return step


def numpy_momentum(rounds, grad, here, v, rate, total, first, every, share):
    """SpIEL-MA step by step: SM3 over rows and columns, then every few updates the largest products of the inactive entries."""
    row, column = np.zeros(12), np.zeros(10)
    for step in range(1, rounds + 1):
        i, j = here // 10, here % 10
        g = grad(here, v)
        nu = np.minimum(row[i], column[j]) + g**2
        np.maximum.at(row, i, nu), np.maximum.at(column, j, nu)
        v = v - rate * g / np.sqrt(nu + 1e-8)
        if step % every == first % every:
            p = 1 if step <= first else share * (1 - step / total)
            out = np.argsort(np.abs(v), kind="stable")[: int(np.floor(p * len(v) + 1e-6))]
            guess = np.outer(row, column).reshape(-1)
            guess[here] = -1
            new = np.argsort(-guess, kind="stable")[: len(out)]
            assert not set(new) & set(here)
            here, v = here.copy(), v.copy()
            here[out], v[out] = new, 0
    return here, v, row, column


def test_momentum_approximation_is_the_papers_step_by_step():
    adapters = spiel(density=0.15, first=3, every=4, share=0.5)
    tx = optax.chain(scale_by_spiel(), optax.scale_by_learning_rate(0.02))
    tx = lr.optim.with_methods(tx, adapters.plan, 20)
    train, frozen = lr.partition(adapters)
    state, step = tx.init(train), jax.jit(tx.update)
    x, target = np.float64(kernel(7, 12, seed=1)), np.float64(kernel(7, 10, seed=2))

    def grad(here, v):
        w = np.float64(K).reshape(-1).copy()
        w[here] += v
        return (2 * x.T @ (x @ w.reshape(12, 10) - target)).reshape(-1)[here]

    for n in range(1, 13):
        updates, state = step(jax.grad(loss)(train, frozen, K), state, train)
        train = optax.apply_updates(train, updates)
        now = lr.join(train, frozen)
        here, v, row, column = numpy_momentum(n, grad, flat(adapters.sites[PATH]), np.zeros(18), 0.02, 20, 3, 4, 0.5)
        found = dict(zip(flat(now.sites[PATH]).tolist(), leaves_of(now)["v"].tolist(), strict=True))
        assert sorted(found) == sorted(here.tolist()), n
        np.testing.assert_allclose([found[h] for h in here.tolist()], v, atol=2e-5)
        np.testing.assert_allclose(leaves_of(now)["row_max"], row, rtol=1e-4)
        np.testing.assert_allclose(leaves_of(now)["column_max"], column, rtol=1e-4)
        if n == 3:
            assert not set(here.tolist()) & set(flat(adapters.sites[PATH]).tolist()), "a random position is left"
    assert len(set(found)) == 18


def test_a_swap_changes_the_function_by_what_it_drops():
    adapters = with_values(spiel(first=1, every=1, share=0.5, schedule="cosine"))
    after = stepper(adapters, optax.set_to_zero())(adapters, kernel(30, seed=4))
    old, new = flat(adapters.sites[PATH]), flat(after.sites[PATH])
    moved = new != old
    assert len(set(new.tolist())) == 30 and new.min() >= 0 and new.max() < 120
    assert moved.sum() == int(30 * 0.25 * (1 + np.cos(np.pi / 10)))
    dropped = np.zeros(120)
    dropped[old[moved]] = np.asarray(adapters.sites[PATH]["v"])[moved]
    change = np.float64(delta(adapters, K)) - np.float64(delta(after, K))
    np.testing.assert_array_equal(change, dropped.reshape(12, 10))


def test_every_layer_of_a_stack_chooses_for_itself():
    weight = jnp.stack([K, kernel(12, 10, seed=8)])
    fields = {"first": 1, "every": 1, "share": 0.5, "schedule": "cosine"}
    stacked, single = with_values(spiel(weight, **fields)), spiel(**fields)
    gradient = kernel(2, 30, seed=31)
    both, alone = stepper(stacked, optax.sgd(0.1))(stacked, gradient), stepper(single, optax.sgd(0.1))
    for n in range(2):
        one = single.replace(sites={PATH: {name: x[n] for name, x in stacked.sites[PATH].items()}})
        after = alone(one, gradient[n]).sites[PATH]
        assert (flat(after) != flat(one.sites[PATH])).any()
        for name, x in after.items():
            np.testing.assert_array_equal(x, both.sites[PATH][name][n])


def test_a_weight_with_few_inactive_entries_exchanges_what_it_can():
    adapters = with_values(spiel(density=0.9, first=1, every=1))
    after = stepper(adapters, optax.set_to_zero())(adapters, kernel(108, seed=4))
    old, new = flat(adapters.sites[PATH]), flat(after.sites[PATH])
    assert set(new[new != old].tolist()) == set(range(120)) - set(old.tolist())
    full = with_values(spiel(density=1.0, first=1, every=1))
    after = stepper(full, optax.set_to_zero())(full, kernel(120, seed=4))
    assert (flat(after.sites[PATH]) == np.arange(120)).all() and (after.sites[PATH]["v"] == full.sites[PATH]["v"]).all()


def test_decay_and_momentum_do_not_move_positions():
    adapters = spiel(first=50)
    after = stepper(adapters, optax.adamw(0.1, weight_decay=0.5))(adapters, jnp.ones(30))
    for name in ("row", "column"):
        assert (after.sites[PATH][name] == adapters.sites[PATH][name]).all()
    assert (np.asarray(after.sites[PATH]["v"]) != 0).all()


def test_values_of_bfloat16_keep_exact_positions():
    params = params_of(kernel(600, 40).astype(jnp.bfloat16))  # bfloat16 does not hold every number above 256
    plan = lr.plan(params, {"layer/kernel": lr.spiel(density=0.02, first=1, every=1)})
    adapters = lr.init(jax.random.key(0), params, plan, dtype=jnp.bfloat16)
    tx = optax.chain(scale_by_spiel(), optax.scale(-0.01))
    after = stepper(adapters, tx)(adapters, kernel(480, seed=4).astype(jnp.bfloat16))
    p = after.sites[PATH]
    assert p["v"].dtype == jnp.bfloat16 and {p[n].dtype for n in p if n != "v"} == {jnp.dtype(jnp.float32)}
    here = flat(p, 40)
    assert len(set(here.tolist())) == 480 and not set(here.tolist()) & set(flat(adapters.sites[PATH], 40).tolist())
    assert all((p[n] == jnp.round(p[n])).all() for n in ("row", "column")) and p["row"].max() > 256


def test_a_swap_holds_the_dense_product_of_one_layer_at_a_time():
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((16, 256, 256), jnp.float32), "bias": jnp.zeros((16, 256))}}
    plan = lr.plan(params, {"layer/kernel": lr.spiel(density=0.01)})
    leaves = {n: jnp.zeros((16, *leaf.shape)) for n, leaf in plan.entries[0].leaves.items()}
    tx = lr.optim.with_methods(optax.sgd(0.1), plan, 100)
    train = {PATH: leaves}
    assert compile_report(tx.update, (train, tx.init(train), train)).temp < 8 * 4 * 256**2
