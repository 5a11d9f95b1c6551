"""IncreLoRA: who grows and when, what a reserve is before and after it is handed over, and that the total is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, loss

import lowrank_jax as lr
from lowrank_jax.optim.grow_triplets import grow_triplets

PARAMS = {"wide": {"kernel": kernel(2, 12, 10), "bias": jnp.zeros((2, 10))}, "narrow": {"kernel": kernel(9, 8, seed=1)}}
WEIGHTS, RANK, TARGET, TOTAL, RESERVE = 3, 8, 4, 40, np.float32(1e-5)


def increlora(**fields):
    return lr.increlora(**{"rank": RANK, "target": TARGET, "alpha": 8, "top": 1, **fields})


def run(method, gradients_of, tx=None):
    """``(train tree, transform's state)`` before training and after every step, under given gradients."""
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*kernel": method}))
    tx = lr.optim.with_methods(tx or optax.adamw(1e-2, weight_decay=0.1), adapters.plan, TOTAL)
    train, _ = lr.partition(adapters)
    state, update = tx.init(train), jax.jit(tx.update)
    history = [(train, state[1][str(method)])]
    for step in range(TOTAL):
        updates, state = update(gradients_of(step, train), state, train)
        train = optax.apply_updates(train, updates)
        history.append((train, state[1][str(method)]))
    return history


def noise(step, train):
    """Gradients that respect the form: none for the slots whose ``e`` is zero, except ``e``'s own where it is active."""
    random = np.random.default_rng(step)

    def of(path, name, x):
        if name == "active":
            return jnp.zeros_like(x)
        leaves = train[path]
        live = leaves["e"] != 0
        live = {"a": live[..., None, :], "b": live[..., None], "e": jnp.arange(RANK) < leaves["active"]}[name]
        return jnp.asarray(random.standard_normal(x.shape), jnp.float32) * live

    return {p: {n: of(p, n, x) for n, x in leaves.items()} for p, leaves in train.items()}


def zeros(step, train):
    return jax.tree.map(jnp.zeros_like, train)


def actives(train):
    return np.concatenate([np.asarray(leaves["active"]).ravel() for leaves in train.values()]).astype(int)


def test_a_new_direction_has_learnt_and_its_singular_value_is_the_reserves():
    """Growth by fresh directions, or by ones whose e trains before they are active, would look otherwise."""
    history, handed_over = [train for train, _ in run(increlora(), noise)], 0
    for before, after in zip(history, history[1:], strict=False):
        for path in before:
            was, now = (np.asarray(t[path]["active"]) for t in (before, after))
            new = (np.arange(RANK) >= was) & (np.arange(RANK) < now)
            handed_over += new.sum()
            assert (np.asarray(after[path]["e"])[new] == RESERVE).all()
            moved = np.abs(np.asarray(before[path]["a"]) - np.asarray(history[0][path]["a"])).max(-2)
            assert (moved[new] > 1e-3).all()
            still = np.abs(np.asarray(after[path]["a"]) - np.asarray(before[path]["a"])).max(-2)
            assert (still[new] < 0.05).all()  # an Adam step, not another draw
    assert handed_over == WEIGHTS * (TARGET - 1)
    for leaves in history[-1].values():  # all that was handed over has trained since
        in_use = np.arange(RANK) < np.asarray(leaves["active"])
        assert ((np.asarray(leaves["e"]) == 0) == ~in_use).all() and (np.asarray(leaves["e"]) != RESERVE).all()


@pytest.mark.parametrize(
    ("gain", "top", "gradients_of"),
    [(1, 1, noise), (5, 3, noise), (2, 2, zeros)],
    ids=["single", "overshooting", "ties"],
)
def test_the_total_is_the_target_and_never_more(gain, top, gradients_of):
    """Steps that do not divide the budget, and scores that are all equal."""
    totals = [int(actives(train).sum()) for train, _ in run(increlora(gain=gain, top=top), gradients_of)]
    assert totals[0] == WEIGHTS and totals[-1] == WEIGHTS * TARGET
    steps = np.diff(totals)
    assert (steps >= 0).all() and steps.max() <= gain * top
    rounds = -(-(WEIGHTS * (TARGET - 1)) // (gain * top))
    at = [int(np.ceil(TOTAL * 0.1 + TOTAL * 0.4 * (k + 1) / rounds - 1e-6)) for k in range(rounds)]
    assert np.flatnonzero(steps).tolist() == [step - 1 for step in at]


def test_reserves_are_held_and_end_at_zero():
    for train, _ in run(increlora(), noise):
        done = actives(train).sum() == WEIGHTS * TARGET
        for leaves in train.values():
            slot, active = np.arange(RANK), np.asarray(leaves["active"])
            waiting = np.asarray(leaves["e"])[np.broadcast_to(slot >= active, leaves["e"].shape)]
            expected = np.where((slot < active + 2) & (not done), RESERVE, 0)[
                np.broadcast_to(slot >= active, leaves["e"].shape)
            ]
            assert waiting.tolist() == expected.tolist()


def test_untouched_slots_keep_their_bits_under_decay():
    history = [train for train, _ in run(increlora(), noise)]
    for before, after in zip(history, history[1:], strict=False):
        for path in before:
            unused = np.asarray(before[path]["e"] == 0) & (np.arange(RANK) >= np.asarray(before[path]["active"]))
            a, b = (np.asarray(before[path][n] != after[path][n]) for n in "ab")
            assert not a.any(-2)[unused].any() and not b.any(-1)[unused].any()


def test_the_score_is_the_papers_without_its_dense_gradient():
    """Rows and columns of D * G exactly, and, for gradients with independent entries, the paper's sum of |D * G| up to a constant."""
    random, ratios = np.random.default_rng(0), []
    for n_in, n_out in ((64, 64), (64, 512), (512, 64), (256, 256)):
        a, b, e = random.standard_normal((n_in, 1)), random.standard_normal((1, n_out)), np.array([0.7])
        g = random.standard_normal((n_in, n_out))
        dense = (a * e) @ b * g
        leaves = {"a": a, "e": e, "b": b, "active": np.ones(1)}
        gradient = {"a": g @ b.T * e, "b": (a * e).T @ g, "e": np.zeros(1), "active": np.zeros(1)}
        tree = lambda leaves: {"x": {n: jnp.asarray(x, jnp.float32) for n, x in leaves.items()}}  # noqa: E731
        tx = grow_triplets(1, 1, 1, 1, 0, 1, betas=(0.0, 0.0))
        _, state = tx.update(tree(gradient), tx.init(tree(leaves)), tree(leaves), gradients=tree(gradient))
        exact = np.abs(dense.sum(1)).sum() / np.sqrt(n_in) + np.abs(dense.sum(0)).sum() / np.sqrt(n_out)
        np.testing.assert_allclose(state.importance.mean["x"], exact, rtol=1e-5)
        ratios.append(exact / (np.abs(dense).sum() / np.sqrt(dense.size)))
    np.testing.assert_allclose(ratios, 2 * np.sqrt(np.pi / 2), rtol=0.15)


def test_the_most_important_weight_grows():
    """Its smoothed score is the largest whatever the order of the weights; ``wide`` has two layers of which the second is loud."""

    def loud(step, train):
        quiet = noise(step, train)
        return jax.tree_util.tree_map_with_path(
            lambda where, g: g * jnp.array([0.1, 10.0]).reshape(2, *[1] * (g.ndim - 1)) if "wide" in str(where) else g,
            quiet,
        )

    history = [train for train, _ in run(increlora(top=1, rank=8), loud)]
    wide = np.asarray(history[-1]["wide/kernel"]["active"]).ravel().tolist()
    assert wide == [1, 8] and history[-1]["narrow/kernel"]["active"].tolist() == [3]


def test_the_penalty_says_nothing_of_importance():
    method = increlora()
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*kernel": method}))
    _, rest = lr.partition(adapters)
    of_penalty = jax.jit(jax.grad(lambda train: lr.penalty(PARAMS, lr.join(train, rest))))
    gradient = of_penalty(lr.partition(adapters)[0])
    assert np.abs(np.asarray(gradient["wide/kernel"]["a"])).max() > 1e-3
    _, state = run(method, lambda step, train: of_penalty(train))[1]
    assert all(np.abs(np.asarray(m)).max() < 1e-7 for m in state.importance.mean.values())


def test_the_penalty_is_of_directions_in_use_or_in_reserve():
    adapters = adapt(kernel(12, 10), increlora(orthogonal=0.5))
    p = leaves_of(adapters)
    a, b = p["a"][:, :3], p["b"][:3]  # one active, two in reserve
    expected = 0.5 / 2 * (((a.T @ a - np.eye(3)) ** 2).sum() + ((b @ b.T - np.eye(3)) ** 2).sum())
    np.testing.assert_allclose(lr.penalty({"layer": {"kernel": kernel(12, 10)}}, adapters), expected, rtol=1e-6)


def test_a_direction_warms_up_on_its_own():
    tx = grow_triplets(target=2, first=1, gain=1, top=1, start=0, stop=1, ramp=4)
    leaves = {"a": jnp.ones((2, 4)), "e": jnp.array([0.5, 1e-5, 0, 0]), "b": jnp.ones((4, 2)), "active": jnp.ones(1)}
    params = {"one": leaves, "two": leaves}
    ones, state, seen = jax.tree.map(jnp.ones_like, params), tx.init(params), []
    for _ in range(7):
        updates, state = tx.update(ones, state, params, gradients=jax.tree.map(jnp.zeros_like, params))
        seen.append(updates["one"])
        params = optax.apply_updates(params, updates)
    assert params["one"]["active"].tolist() == [2] and params["two"]["active"].tolist() == [2]
    # The first reserve was there from the start; its e wakes at the first update and warms up from the second.
    assert [float(u["a"][0, 1]) for u in seen] == [1.0] * 7
    assert [float(u["e"][1]) for u in seen] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [float(u["e"][0]) for u in seen] == [1.0] * 7 and [float(u["a"][0, 3]) for u in seen] == [0.0] * 7


def test_only_active_singular_values_have_a_gradient_and_the_scale_is_alpha_over_active():
    adapters = adapt(kernel(12, 10), increlora())
    adapters = adapters.replace(sites={PATH: {**adapters.sites[PATH], "active": jnp.full(1, 2.0)}})
    train, rest = lr.partition(adapters)
    gradient = jax.grad(loss)(train, rest, kernel(12, 10))[PATH]
    assert (np.asarray(gradient["e"]) != 0).tolist() == [True, True] + [False] * 6
    assert (np.asarray(gradient["a"]) != 0).any(0).tolist() == [False, True, True] + [False] * 5
    assert not np.asarray(gradient["active"]).any()
    p = leaves_of(adapters)
    np.testing.assert_allclose(delta(adapters, kernel(12, 10)), 8 / 2 * (p["a"] * p["e"]) @ p["b"], rtol=1e-5)


def test_compact_is_a_lora_of_the_ranks_reached():
    train, _ = run(increlora(), noise)[-1]
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*kernel": increlora()}))
    trained = lr.join(train, lr.partition(adapters)[1])
    small = lr.compact(trained)
    for path, form in lr.expand(small).items():
        np.testing.assert_allclose(form.delta(None), lr.expand(trained)[path].delta(None), rtol=0, atol=1e-6)
    found = lr.rank_map(trained)
    assert sorted(found.ranks[~np.isnan(found.ranks)].astype(int).tolist()) == sorted(actives(train).tolist())
    assert small.plan.trainable == sum(
        int(leaves["active"].sum()) * (leaves["a"].shape[-2] + leaves["b"].shape[-1]) for leaves in train.values()
    )


@pytest.mark.parametrize(
    "fields",
    [{"target": 9}, {"first": 5}, {"gain": 0}, {"top": 0}, {"start": 0.6}, {"ramp": -1.0}, {"betas": (1.0, 0.85)}],
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"increlora\\({next(iter(fields))}="):
        increlora(**fields)
