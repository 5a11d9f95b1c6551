"""Optimizers over phases: methods' transforms on their own leaves, and state that is carried over."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
from lowrank_jax.optim.freeze_rows import freeze_rows

KERNEL = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
PARAMS = {name: {"kernel": KERNEL} for name in ("plain", "slow", "fast")}
METHODS = {"plain": lr.lora(4), "slow": lr.lamda(4, freeze=1.0), "fast": lr.lamda(4, freeze=0.5)}


def setup(total=8):
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, METHODS))
    tx = lr.optim.with_methods(optax.sgd(1.0), adapters.plan, total)
    return adapters, tx


def test_each_method_freezes_its_own_rows_only():
    adapters, tx = setup()
    train, _ = lr.partition(adapters)
    state, ones = tx.init(train), jax.tree.map(jnp.ones_like, train)
    for step in range(8):
        updates, state = tx.update(ones, state, train)
        frozen = {path: int((np.asarray(leaves["b"]) == 0).all(-1).sum()) for path, leaves in updates.items()}
        assert frozen == {"plain/kernel": 0, "slow/kernel": step // 2, "fast/kernel": min(step, 4)}
        assert all(
            (leaf == -1).all() for path, leaves in updates.items() for name, leaf in leaves.items() if name != "b"
        )


def test_no_method_adds_nothing():
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*": lr.lora(2)}))
    tx = optax.adam(1e-3)
    assert lr.optim.with_methods(tx, adapters.plan, 10) is tx


def test_carried_state_keeps_what_stays():
    adapters, _ = setup()
    total = 8
    tx = lr.optim.with_methods(optax.adamw(1e-2), adapters.plan, total)
    train, frozen = lr.partition(adapters, 0, total)
    state = tx.init(train)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, train), state, train)
        train = optax.apply_updates(train, updates)
    smaller, _ = lr.partition(lr.join(train, frozen), 4, total)
    assert set(smaller["fast/kernel"]) == {"m"} and set(smaller["slow/kernel"]) == {"m", "b"}
    carried = lr.optim.carry_state(tx, state, smaller)
    assert jax.tree.structure(carried) == jax.tree.structure(tx.init(smaller))
    # Going on with the carried state is going on as if nothing had happened to what still trains.
    ones = jax.tree.map(jnp.ones_like, smaller)
    updates, _ = tx.update(ones, carried, smaller)
    expected, _ = tx.update(jax.tree.map(jnp.ones_like, train), state, train)
    for path, leaves in updates.items():
        for name, leaf in leaves.items():
            assert (leaf == expected[path][name]).all(), (path, name)


def test_what_begins_to_train_starts_afresh():
    tx = optax.adam(1e-2)
    old = {"x": {"m": jnp.ones(2)}}
    state = tx.update(old, tx.init(old), old)[1]
    new = tx.init({"x": {"m": jnp.ones(2), "late": jnp.ones(3)}})
    carried = lr.optim.carry_state(tx, state, {"x": {"m": jnp.ones(2), "late": jnp.ones(3)}})
    assert jax.tree.structure(carried) == jax.tree.structure(new)
    mu = carried[0].mu["x"]
    assert (mu["m"] == state[0].mu["x"]["m"]).all() and not mu["late"].any() and int(carried[0].count) == 1


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_rows_of_a_stack_freeze_by_their_own_rank(order):
    tx = freeze_rows("b", freeze_steps=4, ranks=(4, 2), order=order)
    tree = {"x": {"b": jnp.ones((2, 4, 3)), "m": jnp.ones((2, 4, 4))}}
    state = tx.init(tree)
    for step in range(5):
        updates, state = tx.update(tree, state)
        live = np.asarray(updates["x"]["b"]).any(-1)
        for layer, rank in enumerate((4, 2)):
            rows = np.arange(4)
            frozen = min(rank, rank * step // 4)
            expected = rows >= frozen if order == "descending" else rows < rank - frozen
            assert live[layer][:rank].tolist() == expected[:rank].tolist()
        assert (updates["x"]["m"] == 1).all()
