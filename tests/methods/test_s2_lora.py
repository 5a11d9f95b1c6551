"""S2-LoRA: one pair for all weights of a size, sparse coefficients at each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, kernel, leaves_of, training

import lowrank_jax as lr

SHAPES = {"q": (12, 10), "v": (12, 10), "up": (12, 30), "down": (30, 12)}
PARAMS = {name: {"kernel": kernel(*shape)} for name, shape in SHAPES.items()}


def s2_lora(**fields):
    plan = lr.plan(PARAMS, {".*": lr.s2_lora(**{"rank": 3, "alpha": 6, **fields})})
    return lr.init(jax.random.key(0), PARAMS, plan)


def moved(adapters):
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return adapters.replace(sites=jax.tree.map(draw, adapters.sites))


def deltas(adapters):
    return {
        p.partition("/")[0]: np.asarray(form.delta(PARAMS[p.partition("/")[0]]["kernel"]), np.float64)
        for p, form in lr.expand(adapters).items()
    }


def test_weights_of_a_size_share_their_row_and_column_spaces():
    """A pair for each weight, as AdaLoRA has, would give rank 6 both ways."""
    found = deltas(moved(s2_lora()))
    for stacked in (np.vstack, np.hstack):
        assert np.linalg.matrix_rank(stacked([found["q"], found["v"]]), tol=1e-5) == 3
    assert np.abs(found["q"] - found["v"]).max() > 0.1
    assert np.linalg.matrix_rank(np.hstack([found["q"], found["up"]]), tol=1e-5) == 6


def test_the_pair_gets_the_sum_of_its_weights_gradients():
    adapters = moved(s2_lora())
    (name,) = adapters.shared
    p = {x: np.asarray(leaf, np.float64) for x, leaf in adapters.shared[name].items()}
    train, frozen = lr.partition(adapters)

    def total(train):  # linear in every update, with known gradients
        forms = lr.expand(lr.join(train, frozen))
        return sum((forms[f"{n}/kernel"].delta(w["kernel"]) * w["kernel"]).sum() for n, w in PARAMS.items())

    gradient = jax.grad(total)(train)["shared:" + name]
    weighted = sum(
        np.float64(PARAMS[n]["kernel"]) * 2 @ p["b_12x10"].T * adapters.sites[f"{n}/kernel"]["e"] for n in "qv"
    )
    np.testing.assert_allclose(gradient["a_12x10"], weighted, rtol=0, atol=1e-4)


def test_where_it_starts():
    adapters = s2_lora()
    (shared,) = adapters.shared.values()
    assert {name.partition("_")[2] for name in shared} == {"12x10", "12x30", "30x12"}
    assert not any(delta.any() for delta in deltas(adapters).values())
    wide = adapt(kernel(400, 300), lr.s2_lora(rank=50))
    (pair,) = wide.shared.values()
    for factor, axis in ((pair["a_400x300"], 0), (pair["b_400x300"], 1)):
        assert abs((np.asarray(factor) ** 2).sum(axis).mean() - 1) < 0.05
    assert abs(np.corrcoef(np.ravel(pair["a_400x300"])[:15000], np.ravel(pair["b_400x300"]))[0, 1]) < 0.05


def test_the_penalty_counts_every_pair_once():
    adapters = moved(s2_lora(orthogonal=0.3))
    (shared,) = adapters.shared.values()
    expected = []
    for name, leaf in shared.items():
        p = np.asarray(leaf, np.float64)
        expected.append((((p.T @ p if name[0] == "a" else p @ p.T) - np.eye(3)) ** 2).sum())
    assert len(expected) == 6
    np.testing.assert_allclose(lr.penalty(PARAMS, adapters), 0.3 * np.mean(expected), rtol=1e-5)
    assert lr.penalty(PARAMS, s2_lora(orthogonal=0.0)) == 0


def test_coefficients_stop_at_zero_and_the_pair_does_not():
    """``e <- sign(z) max(|z| - threshold, 0)`` of what the optimizer makes of it. A gradient of |e| would step over zero."""
    adapters = s2_lora(threshold=0.25)
    tx = lr.optim.with_methods(optax.sgd(1.0), adapters.plan, 10)
    train, _ = lr.partition(adapters)
    e, gradient = jnp.array([0.5, 0.125, -1.0]), jnp.array([0.125, 0.0, 0.25])
    train = {p: {"e": e} if "e" in leaves else leaves for p, leaves in train.items()}
    gradients = {p: {n: gradient if n == "e" else 0.5 * x for n, x in leaves.items()} for p, leaves in train.items()}
    updates, _ = jax.jit(tx.update)(gradients, tx.init(train), train)
    for path, leaves in optax.apply_updates(train, updates).items():
        for name, leaf in leaves.items():
            expected = [0.125, 0.0, -1.0] if name == "e" else 0.5 * train[path][name]
            assert (np.asarray(leaf) == np.asarray(expected)).all(), (path, name)
    assert s2_lora(threshold=0.0).plan.entries[0].method.transform is None


def test_training_moves_the_pair_and_the_coefficients():
    weight = kernel(12, 10)
    adapters = adapt(weight, lr.s2_lora(rank=4))
    *_, last = training(adapters, weight, lr.optim.with_methods(optax.adamw(1e-2), adapters.plan, 3), 3)
    assert leaves_of(last)["e"].all() and set(last.sites[PATH]) == {"e"}
    for before, after in zip(jax.tree.leaves(adapters.shared), jax.tree.leaves(last.shared), strict=True):
        assert (np.asarray(before) != np.asarray(after)).all()


@pytest.mark.parametrize("fields", [{"rank": 0}, {"dropout": 1.0}, {"threshold": -1.0}, {"orthogonal": -1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        lr.s2_lora(**fields)
