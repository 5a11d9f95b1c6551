"""SpIEL-AG: which entries leave and which come, what a new entry's moments are, and that nothing else moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, params_of

import lowrank_jax as lr
from lowrank_jax.optim import scale_by_spiel, spiel_reselect, swap_share

K = kernel(12, 10)
B1, B2, EPS = 0.9, 0.999, 1e-6
UPDATE = jax.jit(scale_by_spiel(B1, B2, EPS).update)


def spiel(growth, weight=K, **fields):
    return adapt(weight, lr.spiel(**{"density": 0.25, "growth": growth, **fields}))


def flat(adapters, layer=()):
    p = {name: x[layer] for name, x in leaves_of(adapters).items()}
    return (p["row"] * 10 + p["column"]).astype(int)


def dense(seed, like=K):
    return {"layer": {"kernel": kernel(*like.shape, seed=seed)}}


def with_values(adapters, seed=5):
    """Far from the start: entries that differ in size."""
    p = adapters.sites[PATH]
    return adapters.replace(sites={PATH: {**p, "v": kernel(*p["v"].shape, seed=seed)}})


def started(adapters):
    return scale_by_spiel(B1, B2, EPS).init(lr.partition(adapters)[0])


def direction(adapters, state, gradient):
    """What the optimizer makes of a gradient of the entries, and its state."""
    train, _ = lr.partition(adapters)
    g = {PATH: {**jax.tree.map(jnp.zeros_like, train[PATH]), "v": gradient}}
    updates, state = UPDATE(g, state, train)
    return np.asarray(updates[PATH]["v"], np.float64), state


def expected_swap(here, v, gradients, share):
    """The algorithm in sets: ``(leaving positions, entering positions, their summed gradients, their sums of squares)``."""
    g = np.array([np.asarray(x["layer"]["kernel"], np.float64).reshape(-1) for x in gradients])
    number = int(np.floor(share * len(here) + 1e-6))
    candidates = np.argsort(-np.abs(g[0]), kind="stable")[: len(here)]
    outgoing = set(here[np.argsort(np.abs(v), kind="stable")[:number]].tolist())
    valid = [c for c in candidates.tolist() if c not in set(here.tolist()) - outgoing]
    incoming = set(sorted(valid, key=lambda c: -abs(g[:, c].sum()))[:number])
    return outgoing - incoming, incoming - outgoing, g.mean(0), (g**2).mean(0)


def test_the_first_selection_leaves_only_the_largest_gradients():
    """None of the random positions survives unless it is among the k largest entries of the gradient."""
    adapters = with_values(spiel("gradient"))
    before, v = flat(adapters), np.asarray(adapters.sites[PATH]["v"])
    gradients = [dense(seed) for seed in (11, 12, 13)]
    after, _ = spiel_reselect(adapters, started(adapters), gradients, step=5, total_steps=100)
    largest = set(np.argsort(-np.abs(np.asarray(gradients[0]["layer"]["kernel"]).reshape(-1)))[:30].tolist())
    assert set(flat(after).tolist()) == largest
    stays = np.isin(before, list(largest))
    assert 0 < stays.sum() < 30, "nothing to tell apart"
    assert (flat(after)[stays] == before[stays]).all()
    assert np.asarray(after.sites[PATH]["v"]).tolist() == np.where(stays, v, 0).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_later_swap_is_the_papers(seed):
    """The smallest leave, the largest summed gradients of the first batch's candidates come, what is both stays as it is."""
    adapters = with_values(spiel("gradient", share=0.8), seed=20 + seed)
    before, v = flat(adapters), np.asarray(adapters.sites[PATH]["v"], np.float64)
    gradients = [dense(100 * seed + n) for n in range(3)]
    _, state = direction(adapters, started(adapters), kernel(30, seed=3))
    after, new = spiel_reselect(adapters, state, gradients, step=25, total_steps=100)
    leaving, entering, mean, square = expected_swap(before, v, gradients, 0.8 * 0.75)
    assert 0 < len(leaving) < 18, "no entry is both outgoing and incoming"
    moved = flat(after) != before
    assert set(before[moved].tolist()) == leaving and set(flat(after)[moved].tolist()) == entering
    assert np.asarray(after.sites[PATH]["v"]).tolist() == np.where(moved, 0, v).tolist()
    for found, seeds, old in ((new.mean, mean, state.mean), (new.square, square, state.square)):
        found, old = (np.asarray(x[PATH]["v"]) for x in (found, old))
        np.testing.assert_allclose(found[moved], seeds[flat(after)[moved]], rtol=1e-5, atol=1e-7)
        assert (found[~moved] == old[~moved]).all()
    assert np.asarray(new.age[PATH]["v"]).tolist() == np.where(moved, 3, 1).tolist()


def test_a_new_entrys_first_step_is_corrected_with_its_own_age():
    """Three gradients were seen before it was active: its step is their mean over the root of their mean square, and not a sign."""
    adapters = spiel("gradient")
    state = started(adapters)
    for n in range(40):  # the others are old
        _, state = direction(adapters, state, kernel(30, seed=n))
    gradients = [dense(seed) for seed in (11, 12, 13)]
    before = flat(adapters)
    after, state = spiel_reselect(adapters, state, gradients, step=5, total_steps=100)
    new = flat(after) != before
    seen = np.array([np.asarray(g["layer"]["kernel"], np.float64).reshape(-1)[flat(after)] for g in gradients])
    fourth = kernel(30, seed=99)
    found, state = direction(after, state, fourth)
    m = B1 * (1 - B1**3) * seen.mean(0) + (1 - B1) * np.float64(fourth)
    s = B2 * (1 - B2**3) * (seen**2).mean(0) + (1 - B2) * np.float64(fourth) ** 2
    step = m / (1 - B1**4) / (np.sqrt(s / (1 - B2**4)) + EPS)
    np.testing.assert_allclose(found[new], step[new], rtol=1e-4)
    assert (np.abs(np.abs(step[new]) - 1) > 0.05).mean() > 0.5, "a sign would do"
    assert np.asarray(state.age[PATH]["v"]).tolist() == np.where(new, 4, 41).tolist()


def test_a_constant_gradient_gives_a_step_of_full_length_at_every_age():
    adapters = spiel("gradient")
    g = dense(11)
    after, state = spiel_reselect(adapters, started(adapters), [g] * 5, step=5, total_steps=100)
    here = np.asarray(g["layer"]["kernel"], np.float64).reshape(-1)[flat(after)]
    new = flat(after) != flat(adapters)
    for _ in range(3):
        found, state = direction(after, state, jnp.asarray(here, jnp.float32))
        np.testing.assert_allclose(found[new], (here / (np.abs(here) + EPS))[new], rtol=1e-5)


def test_without_swaps_it_is_adam():
    """In float64: optax's own correction, ``1 - b2^t`` in float32, is off by 1e-5 in the first steps."""
    adapters = spiel("gradient")
    train, _ = lr.partition(adapters)
    train = {**train, "head/kernel": {"w": kernel(3, 4)}}
    tx = scale_by_spiel(B1, B2, EPS)
    state, update = tx.init(train), jax.jit(tx.update)
    leaves = {PATH: "v", "head/kernel": "w"}
    m, s = dict.fromkeys(leaves, 0), dict.fromkeys(leaves, 0)
    for step in range(25):
        g = jax.tree.map(lambda x, n=step: kernel(*x.shape, seed=n), train)
        updates, state = update(g, state, train)
        for path, name in leaves.items():
            wide = np.asarray(g[path][name], np.float64)
            m[path], s[path] = B1 * m[path] + (1 - B1) * wide, B2 * s[path] + (1 - B2) * wide**2
            exact = m[path] / (1 - B1 ** (step + 1)) / (np.sqrt(s[path] / (1 - B2 ** (step + 1))) + EPS)
            np.testing.assert_allclose(updates[path][name], exact, rtol=2e-6, atol=2e-7)
        assert not any(np.asarray(updates[PATH][name]).any() for name in ("row", "column"))
    assert jax.tree.map(jnp.shape, state.mean) == {PATH: {"v": (30,)}, "head/kernel": {"w": (3, 4)}}


def test_positions_stay_apart_and_a_swap_changes_the_function_by_what_it_drops():
    adapters = with_values(spiel("gradient", share=0.5))
    after, _ = spiel_reselect(adapters, started(adapters), [dense(1)], step=25, total_steps=125)
    old, new = flat(adapters), flat(after)
    moved = new != old
    assert len(set(new.tolist())) == 30 and 0 < moved.sum() <= 12
    dropped = np.zeros(120)
    dropped[old[moved]] = np.asarray(adapters.sites[PATH]["v"])[moved]
    change = np.float64(delta(adapters, K)) - np.float64(delta(after, K))
    np.testing.assert_array_equal(change, dropped.reshape(12, 10))


def test_layers_of_a_stack_choose_for_themselves_from_their_own_gradients():
    """A rule for two of three layers: each as if it were alone, and every other gradient passed over."""
    weight = jnp.stack([K, kernel(12, 10, seed=8), kernel(12, 10, seed=9)])
    gradients = [dense(31, weight), dense(32, weight)]
    adapters = with_values(adapt(weight, lr.on_layers(lr.spiel(density=0.25, growth="gradient", share=0.5), [0, 2])))
    both, _ = spiel_reselect(adapters, started(adapters), gradients, step=20, total_steps=100)
    for n, layer in enumerate((0, 2)):
        v = np.asarray(adapters.sites[PATH]["v"][n], np.float64)
        own = [{"layer": {"kernel": g["layer"]["kernel"][layer]}} for g in gradients]
        leaving, entering, _, _ = expected_swap(flat(adapters, n), v, own, 0.5 * 0.8)
        moved = flat(both, n) != flat(adapters, n)
        assert leaving and set(flat(adapters, n)[moved].tolist()) == leaving
        assert set(flat(both, n)[moved].tolist()) == entering


def test_on_a_mesh_the_choice_is_the_same_and_everything_stays_in_its_place():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))  # noqa: E731
    weight, results = kernel(12, 20), []
    for spec in (("fsdp", "tensor"), None):
        here = lambda x, spec=spec: x if spec is None else place(x, *spec)  # noqa: E731
        params = params_of(here(weight))
        plan = lr.plan(params, {"layer/kernel": lr.spiel(density=0.25, growth="gradient")})
        adapters = lr.init(jax.random.key(0), params, plan)
        state = jax.tree.map(lambda x, spec=spec: x if spec is None else place(x), started(adapters))
        gradients = [params_of(here(kernel(12, 20, seed=n))) for n in range(2)]
        after = spiel_reselect(adapters, state, gradients, step=5, total_steps=100)
        for old, new in zip(jax.tree.leaves((adapters, state)), jax.tree.leaves(after), strict=True):
            assert old.sharding == new.sharding
        results.append(jax.tree.map(np.asarray, after[0].sites))
    assert (results[0][PATH]["row"] == results[1][PATH]["row"]).all()
    assert (results[0][PATH]["column"] == results[1][PATH]["column"]).all()


def test_the_share_falls():
    assert [round(float(swap_share(n, 100, 5)), 4) for n in (5, 25, 50, 100)] == [1, 0.15, 0.1, 0]
    cosine = [round(float(swap_share(n, 100, 5, 0.2, "cosine")), 4) for n in (0, 5, 50, 100)]
    assert cosine == [0.2, round(0.1 * (1 + np.cos(np.pi / 20)), 4), 0.1, 0]


def test_a_share_of_nothing_changes_nothing():
    adapters = with_values(spiel("gradient"))
    state = started(adapters)
    after, new = spiel_reselect(adapters, state, [dense(1)], step=100, total_steps=100)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (adapters, state), (after, new)))


def test_decay_and_momentum_do_not_move_positions():
    adapters = spiel("gradient")
    tx = lr.optim.with_methods(optax.adamw(0.1, weight_decay=0.5), adapters.plan, 100)
    train, _ = lr.partition(adapters)
    state, update = tx.init(train), jax.jit(tx.update)
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.ones_like, train), state, train)
        train = optax.apply_updates(train, updates)
    assert all((train[PATH][name] == adapters.sites[PATH][name]).all() for name in ("row", "column"))
    assert (np.asarray(train[PATH]["v"]) != 0).all()


def test_values_of_bfloat16_keep_exact_positions_and_wide_moments():
    params = params_of(kernel(600, 40).astype(jnp.bfloat16))  # bfloat16 does not hold every number above 256
    plan = lr.plan(params, {"layer/kernel": lr.spiel(density=0.02, growth="gradient")})
    adapters = lr.init(jax.random.key(0), params, plan, dtype=jnp.bfloat16)
    assert adapters.sites[PATH]["v"].dtype == jnp.bfloat16
    state = started(adapters)
    for n in range(4):
        _, state = direction(adapters, state, kernel(480, seed=n).astype(jnp.bfloat16))
    assert state.age[PATH]["v"].tolist() == [4] * 480
    assert {x.dtype for x in jax.tree.leaves((state.mean, state.square))} == {jnp.dtype(jnp.float32)}
    gradient = kernel(600, 40, seed=7).astype(jnp.bfloat16)
    after, _ = spiel_reselect(adapters, state, [params_of(gradient)], step=5, total_steps=100)
    p, size = leaves_of(after), np.abs(np.float64(gradient)).reshape(-1)
    here = (p["row"] * 40 + p["column"]).astype(int)
    assert len(set(here.tolist())) == 480 and size[here].min() >= np.sort(size)[-480]
    assert after.sites[PATH]["v"].dtype == jnp.bfloat16


def test_it_finds_the_entries_that_matter():
    """Twelve entries of a weight are wrong. A fixed random choice cannot repair them."""
    random = np.random.default_rng(0)
    wrong = random.choice(120, 12, replace=False)
    target = np.asarray(K).reshape(-1).copy()
    target[wrong] += np.sign(random.standard_normal(12))
    x = kernel(200, 12, seed=1)
    y = x @ jnp.asarray(target.reshape(12, 10))

    def run(select):
        adapters = spiel("gradient", density=0.15)
        error = lambda train, frozen, w: ((x @ (w + delta(lr.join(train, frozen), w)) - y) ** 2).mean()  # noqa: E731
        gradient, dense_gradient = jax.jit(jax.grad(error)), jax.jit(jax.grad(error, argnums=2))
        tx = optax.chain(scale_by_spiel(), optax.scale_by_learning_rate(0.05))
        tx = lr.optim.with_methods(tx, adapters.plan, 120)
        train, frozen = lr.partition(adapters)
        state, update = tx.init(train), jax.jit(tx.update)
        for step in range(1, 121):
            updates, state = update(gradient(train, frozen, K), state, train)
            train = optax.apply_updates(train, updates)
            if select and step % 20 == 5:
                seen = [{"layer": {"kernel": dense_gradient(train, frozen, K)}}]
                after, state = spiel_reselect(lr.join(train, frozen), state, seen, step, 120)
                train, frozen = lr.partition(after)
        return float(error(train, frozen, K)), set(flat(lr.join(train, frozen)).tolist())

    fixed, _ = run(False)
    chosen, where = run(True)
    assert chosen < 0.05 * fixed and set(wrong.tolist()) <= where


def test_bad_input_is_refused_by_name():
    adapters = spiel("gradient")
    state, good = started(adapters), dense(1)
    select = lambda gradients, state=state, adapters=adapters: spiel_reselect(adapters, state, gradients, 5, 100)  # noqa: E731
    with pytest.raises(ValueError, match="spiel_reselect: there are no gradients; pass at least one"):
        select([])
    with pytest.raises(ValueError, match="spiel_reselect: the gradients hold no layer/kernel"):
        select([{"other": {"kernel": K}}])
    with pytest.raises(ValueError, match=r"gradient of layer/kernel has shape \(10, 12\), expected \(12, 10\)"):
        select([{"layer": {"kernel": K.T}}])
    for bad in ([dense(2), params_of(jnp.full_like(K, jnp.nan))], [params_of(K.at[0, 0].set(jnp.inf)), dense(2)]):
        with pytest.raises(ValueError, match="gradient of layer/kernel is not finite"):
            select(bad)
    with pytest.raises(ValueError, match="spiel_reselect: the optimizer's state holds no moments of layer/kernel"):
        select([good], state=optax.adam(1e-3).init(lr.partition(adapters)[0]))
    with pytest.raises(ValueError, match="spiel_reselect: no weight of this adapter has spiel"):
        select([good], adapters=spiel("momentum"))
    with pytest.raises(ValueError, match=r"scale_by_spiel\(b1=1.0\)"):
        scale_by_spiel(1.0)
    with pytest.raises(ValueError, match="scale_by_spiel: it needs the parameters"):
        scale_by_spiel().update(lr.partition(spiel("momentum"))[0], started(spiel("momentum")))
    with pytest.raises(ValueError, match=r"swap_share\(schedule='steps'\)"):
        swap_share(1, 10, 5, 0.2, "steps")
