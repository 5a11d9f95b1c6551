"""AdaLoRA: who is pruned and when, that pruned means zero, what the penalty is, and the LoRA that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss

import lowrank_jax as lr

PARAMS = {"wide": {"kernel": kernel(2, 12, 10), "bias": jnp.zeros((2, 10))}, "narrow": {"kernel": kernel(6, 5, seed=1)}}
RANK, TARGET, TOTAL, START, STOP = 4, 2, 20, 0.1, 0.7


def adalora(**fields):
    return lr.adalora(**{"rank": RANK, "target": TARGET, "alpha": 8, "start": START, "stop": STOP, **fields})


def run(method, gradients_of, tx=None):
    """The train tree before training and after every step, under given gradients ``step, path, leaf, shape -> array``."""
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*kernel": method}))
    tx = lr.optim.with_methods(tx or optax.adamw(3e-2, weight_decay=0.1), adapters.plan, TOTAL)
    train, _ = lr.partition(adapters)
    state, update, history = tx.init(train), jax.jit(tx.update), [train]
    for step in range(TOTAL):
        gradients = {
            p: {n: gradients_of(step, p, n, x.shape) for n, x in leaves.items()} for p, leaves in train.items()
        }
        updates, state = update(gradients, state, train)
        train = optax.apply_updates(train, updates)
        history.append(train)
    return history


def random_gradient(step, path, name, shape):
    seed = [step, len(path), ord(name)]
    # Sizes that differ between directions of a stack: a choice layer by layer would be another one.
    size = np.exp(np.random.default_rng(len(path)).standard_normal((*shape[:-2], 1, 1))) if len(shape) > 1 else 1.0
    return jnp.asarray(size * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def budget_at(step, first, last):
    start, stop = START * TOTAL, STOP * TOTAL
    left = 1 - min(max((step - start) / (stop - start), 0), 1)
    return last + int((first - last) * left**3 + 1e-9)


def nonzero(train):
    return {path: np.asarray(leaves["e"] != 0) for path, leaves in train.items()}


def test_kept_are_the_best_of_all_weights_by_smoothed_sensitivity_times_uncertainty():
    """The paper's algorithm in float64: |w g| smoothed, times its smoothed variation, averaged over rows and columns."""
    history = run(adalora(), random_gradient)
    mean = jax.tree.map(lambda x: np.zeros(x.shape), history[0])
    spread, order_of = mean, ("narrow/kernel", "wide/kernel")
    for step in range(1, TOTAL + 1):
        before = jax.tree.map(lambda x: np.asarray(x, np.float64), history[step - 1])
        if step < STOP * TOTAL:
            now = {
                p: {n: np.abs(w * np.asarray(random_gradient(step - 1, p, n, w.shape))) for n, w in leaves.items()}
                for p, leaves in before.items()
            }
            mean = jax.tree.map(lambda m, i: 0.85 * m + 0.15 * i, mean, now)
            spread = jax.tree.map(lambda u, i, m: 0.85 * u + 0.15 * np.abs(i - m), spread, now, mean)
        scores = jax.tree.map(np.multiply, mean, spread)
        each = {p: (s["e"] + s["a"].mean(-2) + s["b"].mean(-1)) for p, s in scores.items()}
        flat = np.concatenate([each[p].ravel() for p in order_of])
        kept = np.zeros(flat.size, bool)
        budget = budget_at(step, 3 * RANK, 3 * TARGET)
        kept[np.argsort(-flat, kind="stable")[:budget]] = True
        got = np.concatenate([nonzero(history[step])[p].ravel() for p in order_of])
        assert got.sum() == budget, step
        assert (got == kept).all(), step
    layers = nonzero(history[-1])["wide/kernel"].sum(-1)
    assert len({*layers.tolist(), *nonzero(history[-1])["narrow/kernel"].sum(-1, keepdims=True).tolist()}) > 1


@pytest.mark.parametrize("target", [1, 2, 3])
def test_ties_do_not_change_the_number(target):
    """No gradient at all: every score is zero, and a threshold would prune all of them or none."""
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*kernel": adalora()}))
    train = jax.tree.map(lambda x: x + 1, lr.partition(adapters)[0])
    tx = lr.optim.prune_triplets(target, start=0, stop=1)
    zeros = jax.tree.map(jnp.zeros_like, train)
    updates, _ = tx.update(zeros, tx.init(train), train, gradients=zeros)
    assert sum(k.sum() for k in nonzero(optax.apply_updates(train, updates)).values()) == 3 * target


def test_a_budget_of_parameters_is_held():
    history = run(adalora(budget="parameters"), random_gradient)
    cost = {"wide/kernel": 22, "narrow/kernel": 11}
    spent = [sum(cost[p] * int(k.sum()) for p, k in nonzero(h).items()) for h in history]
    allowed = [budget_at(s, 55 * RANK, 55 * TARGET) for s in range(TOTAL + 1)]
    assert all(a - 22 < s <= a for s, a in zip(spent[1:], allowed[1:], strict=True))


def test_the_choice_is_final_from_stop_on():
    history = run(adalora(), random_gradient)
    final = nonzero(history[int(STOP * TOTAL)])
    for train in history[int(STOP * TOTAL) :]:
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), nonzero(train), final))


@pytest.mark.parametrize("interval", [1, 3])
def test_pruned_is_zero_whatever_the_optimizer_does_and_factors_are_kept(interval):
    history = run(adalora(interval=interval), random_gradient)
    for step in range(1, TOTAL + 1):
        total = sum(k.sum() for k in nonzero(history[step]).values())
        prunes = step >= STOP * TOTAL or (step > START * TOTAL and step % interval == 0)
        assert total == (budget_at(step, 3 * RANK, 3 * TARGET) if prunes else 3 * RANK)
    e, a = np.asarray(history[-1]["wide/kernel"]["e"]), np.asarray(history[-1]["wide/kernel"]["a"])
    assert (e == 0).any() and np.abs(a).min(-2)[e == 0].max() > 0
    assert (a != np.asarray(history[-2]["wide/kernel"]["a"])).all()


def test_nothing_is_pruned_at_first():
    history = run(adalora(), random_gradient)
    assert all(all(k.all() for k in nonzero(train).values()) for train in history[1 : int(START * TOTAL) + 1])


def test_the_state_can_be_donated():
    train = lr.partition(adapt(kernel(12, 10), adalora()))[0]
    state = lr.optim.prune_triplets(TARGET, 2, 14).init(train)
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}) == len(jax.tree.leaves(state))


def test_penalty_is_the_papers_or_the_releases():
    adapters = adapt(kernel(2, 12, 10), adalora(orthogonal=0.5))
    params = {"layer": {"kernel": kernel(2, 12, 10), "bias": jnp.zeros((2, 10))}}
    p, one = leaves_of(adapters), np.eye(RANK)
    norms = [np.linalg.norm(p["a"][n].T @ p["a"][n] - one) for n in range(2)]
    norms += [np.linalg.norm(p["b"][n] @ p["b"][n].T - one) for n in range(2)]
    np.testing.assert_allclose(lr.penalty(params, adapters), 0.5 * np.mean(np.square(norms)), rtol=1e-6)
    official = adapt(kernel(2, 12, 10), adalora(orthogonal=0.5, compat="official"))
    np.testing.assert_allclose(lr.penalty(params, official), 0.5 * np.mean(norms), rtol=1e-6)
    orthonormal = official.replace(sites={PATH: {**official.sites[PATH], "a": jnp.eye(12)[None, :, :4].repeat(2, 0)}})
    gradient = jax.grad(lambda a: lr.penalty(params, a))(orthonormal)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_init_is_normal_factors_and_no_singular_values():
    p = leaves_of(adapt(kernel(300, 200), adalora()))
    assert not p["e"].any()
    for name in "ab":
        assert abs(p[name].std() - 0.02) < 0.002 and abs(p[name].mean()) < 0.002
    train, frozen = lr.partition(adapt(kernel(12, 10), adalora()))
    assert np.asarray(jax.grad(loss)(train, frozen, kernel(12, 10))[PATH]["e"]).all()


def test_compact_is_a_lora_of_what_is_left():
    weight = kernel(3, 12, 10)
    adapters = adapt(weight, adalora(dropout=0.1))
    e = jnp.array([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]])
    adapters = adapters.replace(sites={PATH: {**adapters.sites[PATH], "e": e}})
    small = lr.compact(adapters)
    method = small.plan.entries[0].method
    assert method == lr.lora(rank=(2, 1, 1), alpha=4)  # s = 8 / 4 as before, times the padded rank 2
    assert small.plan.trainable == 4 * 22
    np.testing.assert_allclose(delta(small, weight), delta(adapters, weight), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(small.sites[PATH]["a"][0], adapters.sites[PATH]["a"][0][:, [1, 3]])


@pytest.mark.parametrize(
    "fields",
    [{"budget": "ranks"}, {"compat": "peft"}, {"start": 0.8}, {"target": 5}, {"interval": 0}, {"dropout": 1.0},
     {"betas": (0.85, 1.0)}],
)  # fmt: skip
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"adalora\\({next(iter(fields))}="):
        adalora(**fields)
