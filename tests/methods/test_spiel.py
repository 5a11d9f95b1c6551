"""SpIEL as a method: how many entries, where they start, what is learnt and what is only set."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss, params_of, training

import lowrank_jax as lr

K = kernel(12, 10)


def flat(leaves):
    return (np.asarray(leaves["row"]) * 10 + np.asarray(leaves["column"])).astype(int)


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_it_starts_at_the_base_on_random_positions_of_their_own(growth):
    weight = jnp.stack([K, K])
    adapters = adapt(weight, lr.spiel(density=0.3, growth=growth))
    assert (lr.merge(params_of(weight), adapters)["layer"]["kernel"] == weight).all()
    first, second = (flat({n: x[layer] for n, x in adapters.sites[PATH].items()}) for layer in range(2))
    for here in (first, second):
        assert (np.diff(here) > 0).all() and here.min() >= 0 and here.max() < 120 and len(here) == 36
    assert first.tolist() != second.tolist()
    counts = np.zeros(120)
    for seed in range(200):
        plan = lr.plan(params_of(K), {"layer/kernel": lr.spiel(density=0.3)})
        counts[flat(lr.init(jax.random.key(seed), params_of(K), plan).sites[PATH])] += 1
    assert abs(counts[:60].sum() / counts.sum() - 0.5) < 0.03 and counts.min() > 30, "not uniform"


def test_only_the_values_are_learnt_and_counted():
    for growth, states in (("gradient", {"row", "column"}), ("momentum", {"row", "column", "row_max", "column_max"})):
        adapters = adapt(K, lr.spiel(density=0.3, growth=growth))
        leaves = adapters.plan.entries[0].leaves
        assert {name for name, leaf in leaves.items() if leaf.state} == states and set(leaves) == {"v", *states}
        assert adapters.plan.trainable == lr.count(adapters).trainable == 36
        train, frozen = lr.partition(adapters)
        gradient = jax.grad(loss)(train, frozen, K)[PATH]
        assert np.asarray(gradient["v"]).all() and not any(np.asarray(gradient[name]).any() for name in states)


def test_the_gradient_of_the_values_is_the_dense_one_at_their_positions():
    adapters = adapt(K, lr.spiel(density=0.3))
    train, frozen = lr.partition(adapters)
    dense = jax.grad(loss, argnums=2)(train, frozen, K)
    gathered = np.asarray(dense).reshape(-1)[flat(adapters.sites[PATH])]
    np.testing.assert_allclose(jax.grad(loss)(train, frozen, K)[PATH]["v"], gathered, rtol=1e-5)


def test_a_total_is_shared_out_by_size():
    params = {
        "small": {"kernel": kernel(12, 10)},
        "stack": {"kernel": kernel(3, 20, 10), "bias": jnp.zeros((3, 10))},
        "table": {"embedding": kernel(7, 4)},
    }
    plan = lr.plan(params, {".*(kernel|embedding)": lr.spiel(total=100)})
    sizes = {"small/kernel": 120, "stack/kernel": 200, "table/embedding": 28}
    whole = 120 + 3 * 200 + 28
    held = {e.site.path: e.leaves["v"].shape for e in plan.entries}
    assert held == {path: (100 * size // whole,) for path, size in sizes.items()}
    assert plan.trainable == 16 + 3 * 26 + 3
    entry = plan.entries[0]
    assert lr.build("spiel", dict(entry.method.config)) == entry.method


def test_training_with_the_methods_line_alone_moves_positions():
    """SpIEL-MA needs no more than `with_methods`, whatever the optimizer."""
    adapters = adapt(K, lr.spiel(density=0.3, first=2, every=3))
    tx = lr.optim.with_methods(optax.adamw(0.05), adapters.plan, 40)
    history = [flat(a.sites[PATH]) for a in training(adapters, K, tx, 40, 12)]
    changed = [int((a != b).sum()) for a, b in zip(history, history[1:], strict=False)]
    assert changed[1] == 36 and changed[4] == int(36 * 0.2 * (1 - 5 / 40))
    assert [update for update, n in enumerate(changed, 1) if n] == [2, 5, 8, 11]


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_what_is_left_after_training_are_positions_and_changes(growth):
    weight = jnp.stack([K, 2 * K])
    adapters = adapt(weight, lr.spiel(density=0.3, growth=growth, first=2, every=2))
    tx = lr.optim.with_methods(optax.adam(0.1), adapters.plan, 6)
    trained = list(training(adapters, weight, tx, 6))[-1]
    small = lr.compact(trained)
    assert small.plan.entries[0].method.name == "sparse_update" and set(small.sites[PATH]) == {"indices", "values"}
    assert (delta(small, weight) == delta(trained, weight)).all() and np.asarray(delta(small, weight)).any()
    assert leaves_of(small)["values"].shape == (2, 36)


@pytest.mark.parametrize(
    "fields",
    [
        {"density": 0.0}, {"density": 1.5}, {"total": 0}, {"growth": "random"}, {"every": 0}, {"first": 0}, {"share": 1.5},
        {"schedule": "step"},
    ],
)  # fmt: skip
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"spiel\\({next(iter(fields))}="):
        lr.spiel(**fields)


def test_a_weight_that_does_not_fit_is_named():
    shape = lambda *s: params_of(jax.ShapeDtypeStruct(s, jnp.float32))  # noqa: E731
    with pytest.raises(ValueError, match="spiel at layer/kernel: density=0.001 of 120 entries is none"):
        adapt(K, lr.spiel(density=0.001))
    with pytest.raises(ValueError, match="spiel at layer/kernel: 4294967296 entries are too many"):
        lr.plan(shape(2**16, 2**16), {"layer/kernel": lr.spiel()})
    with pytest.raises(ValueError, match="spiel at layer/kernel: a dimension of 16777218 is more than 16777216"):
        lr.plan(shape(2**24 + 2, 4), {"layer/kernel": lr.spiel()})
    with pytest.raises(ValueError, match="spiel at layer/kernel: total=121 gives it 121 of its 120 entries"):
        adapt(K, lr.spiel(total=121))
    params = {"big": {"kernel": kernel(100, 100)}, "thin": {"kernel": kernel(2, 2)}}
    with pytest.raises(ValueError, match="spiel at thin/kernel: total=50 gives it 0 of its 4 entries"):
        lr.plan(params, {".*": lr.spiel(total=50)})
