"""LT-SFT: a global choice, a start from the beginning, entries that keep their bits, and vectors that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

import lowrank_jax as lr
from lowrank_jax.lt_sft import SparseDelta, allowed, l1_distance, load_delta, lottery, mask_updates, top_changes

START = {
    "up": {"kernel": kernel(6, 8, seed=1), "bias": kernel(8, seed=2)},
    "norm": {"scale": kernel(8, seed=3)},
    "head": {"kernel": kernel(8, 3, seed=4)},
}


def moved(tree, seed=0, scale=0.1):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(scale * random.standard_normal(x.shape), x.dtype), tree)


def distances(start, tuned):
    return jax.tree.map(lambda a, b: np.abs(np.float32(b) - np.float32(a)), start, tuned)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def masked(tree, n):
    """A delta of some entries of a tree: a random ``n`` of them moved."""
    mask = top_changes(tree, moved(tree, n), entries=n)
    tuned = jax.tree.map(lambda x, y, m: jnp.where(m, y, x), tree, moved(tree, 50 + n), mask)
    return tuned, mask


def test_the_threshold_is_global():
    """One tensor moved a hundred times as far: it takes the whole budget, as it would not if each tensor had its share."""
    tuned = moved(START)
    tuned["up"]["kernel"] = START["up"]["kernel"] + 100 * (tuned["up"]["kernel"] - START["up"]["kernel"])
    mask = top_changes(START, tuned, entries=30)
    assert int(mask["up"]["kernel"].sum()) == 30 and not any(
        m.any() for m in jax.tree.leaves(mask) if m.shape != (6, 8)
    )
    for entries in (1, 17, 60, 80):
        mask = top_changes(START, moved(START), entries=entries)
        apart = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(distances(START, moved(START)))])
        threshold = np.sort(apart)[-entries]
        for d, m in zip(jax.tree.leaves(distances(START, moved(START))), jax.tree.leaves(mask), strict=True):
            assert (np.asarray(m) == (d >= threshold)).all()


def test_equal_changes_never_give_more_than_asked_for():
    """The release takes all entries at the threshold; with bfloat16 parameters, or rows that never moved, these are many."""
    same = jax.tree.map(lambda x: x + 0.5, jax.tree.map(lambda x: jnp.round(x), START))
    rounded = jax.tree.map(lambda x: jnp.round(x), START)
    for start, tuned in ((rounded, same), (START, START), (jax.tree.map(lambda x: x.astype(jnp.bfloat16), START),) * 2):
        mask = top_changes(start, tuned, entries=20)
        assert sum(int(m.sum()) for m in jax.tree.leaves(mask)) == 20
    wide = jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)
    mask = top_changes(wide, moved(wide), entries=20)
    chosen = [
        d[np.asarray(m)] for d, m in zip(*map(jax.tree.leaves, (distances(wide, moved(wide)), mask)), strict=True)
    ]
    rest = [d[~np.asarray(m)] for d, m in zip(*map(jax.tree.leaves, (distances(wide, moved(wide)), mask)), strict=True)]
    assert np.concatenate(chosen).min() >= np.concatenate(rest).max()


def test_a_density_is_of_what_may_be_masked():
    mask = top_changes(START, moved(START), density=0.25, whole=["head"], frozen=["norm"])
    assert sum(int(m.sum()) for m in (mask["up"]["kernel"], mask["up"]["bias"])) == int(0.25 * 56)
    assert mask["head"]["kernel"].shape == () and mask["head"]["kernel"] and not mask["norm"]["scale"]


def test_what_was_chosen_before_stays_and_is_not_counted_again():
    first = top_changes(START, moved(START), entries=20)
    both = top_changes(START, moved(START, 1), entries=15, chosen=first)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(both), strict=True):
        assert (np.asarray(a) <= np.asarray(b)).all()
    assert sum(int(m.sum()) for m in jax.tree.leaves(both)) == 35


def training(calls, steps=4, rate=0.1):
    """A training that decays, with momentum; every call makes its own optimizer, and notes where it began."""

    def loss(p, x):
        y = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) * p["norm"]["scale"]
        return ((y @ p["head"]["kernel"] - 1) ** 2).mean()

    def train(params, mask):
        calls.append((jax.tree.map(np.array, params), jax.tree.map(np.array, mask)))
        tx = optax.chain(optax.adamw(rate, weight_decay=0.5), mask_updates(mask))
        state = tx.init(params)

        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params, kernel(5, 6)), state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(steps):
            params, state = step(params, state)
        return params

    return train


def test_the_second_phase_starts_from_the_beginning():
    """The lottery ticket is rewound: the mask is of the first phase, the values are not."""
    calls = []
    ticket = lottery(training(calls), START, entries=25, whole=["head"], frozen=["norm"])
    (begin, everything), (again, mask) = calls
    assert bits(begin) == bits(again) == bits(START)
    assert [bool(m.all()) for m in jax.tree.leaves(everything)] == [True, False, True, True]  # head, norm, up
    full = training([])(jax.tree.map(jnp.copy, START), allowed(START, whole=["head"], frozen=["norm"]))
    expected = top_changes(START, full, entries=25, whole=["head"], frozen=["norm"])
    assert bits(mask) == bits(expected) == bits(ticket.mask)
    alone = training([])(jax.tree.map(jnp.copy, START), expected)
    assert bits(alone) == bits(ticket.params)


def test_masked_entries_keep_their_bits_under_decay():
    """Weight decay and momentum move what has a gradient of zero; an update that is zeroed last does not."""
    start = jax.tree.map(lambda x: x.at[..., 0].set(-0.0), START)  # a zero has a sign
    for params in (start, jax.tree.map(lambda x: x.astype(jnp.bfloat16), start)):
        ticket = lottery(training([]), params, entries=25, whole=["head"], frozen=["norm"])
        for (path, old), new, mask in zip(
            jax.tree_util.tree_leaves_with_path(params), *map(jax.tree.leaves, ticket), strict=True
        ):
            old, new, mask = (np.asarray(x) for x in (old, new, mask))
            words = [x.view(np.uint16 if x.itemsize == 2 else np.uint32) for x in (old, new)]
            assert (words[0] == words[1])[~np.broadcast_to(mask, old.shape)].all(), path
            inside = np.broadcast_to(mask, old.shape)
            assert (old != new)[inside].sum() > 0.9 * inside.sum() - 1, path


def test_all_entries_are_full_fine_tuning():
    calls = []
    size = sum(x.size for x in jax.tree.leaves(START))
    ticket = lottery(training(calls), START, entries=size)
    assert all(m.all() for m in jax.tree.leaves(ticket.mask))
    full = training([])(jax.tree.map(jnp.copy, START), allowed(START))
    assert bits(ticket.params) == bits(full)


def test_rounds_grow_the_mask_and_go_on_from_each_other():
    calls = []
    ticket = lottery(training(calls), START, entries=30, rounds=3)
    sizes = [sum(int(m.sum()) for m in jax.tree.leaves(mask)) for _, mask in calls[1::2]]
    assert sizes == [10, 20, 30] and len(calls) == 6
    assert all(bits(calls[n][0]) == bits(calls[n + 1][0]) for n in (0, 2, 4))
    assert bits(calls[2][0]) != bits(START) and bits(ticket.mask) == bits(calls[5][1])


def test_a_delta_applies_and_reverts():
    tuned, mask = masked(START, 20)
    delta = SparseDelta.between(START, tuned, mask, smallest=0.0)
    assert sum(x.size for x in delta.indices.values()) == 20
    for path, here in delta.indices.items():
        assert here.dtype == jnp.int32 and (np.diff(np.asarray(here)) > 0).all() and here.size, path
    again = jax.jit(lambda p, d: d.apply(p))(START, delta)
    back = jax.jit(lambda p, d: d.revert(p))(again, delta)
    for a, b, c, d, m in zip(*map(jax.tree.leaves, (again, tuned, back, START, mask)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        np.testing.assert_allclose(c, d, rtol=0, atol=1e-6)
        assert (np.asarray(a)[~np.asarray(m)] == np.asarray(d)[~np.asarray(m)]).all()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)
    tuned, mask = masked(narrow, 20)
    delta = SparseDelta.between(narrow, tuned, mask)
    assert bits(delta.apply(narrow)) == bits(tuned) and bits(delta.revert(tuned)) == bits(narrow)


def test_small_changes_are_dropped():
    tuned = jax.tree.map(lambda x: x, START)
    tuned = {**tuned, "norm": {"scale": START["norm"]["scale"].at[0].set(1.0).at[1].add(1e-3)}}
    start = {**START, "norm": {"scale": START["norm"]["scale"].at[0].set(1.0 + 2**-23)}}
    assert SparseDelta.between(start, tuned, None).indices["norm/scale"].tolist() == [0, 1]
    assert SparseDelta.between(start, tuned, None, smallest=1e-6).indices["norm/scale"].tolist() == [1]
    assert set(SparseDelta.between(start, tuned, None).indices) == {"norm/scale"}


def test_deltas_add_up_in_any_order():
    """``start + task + language``: where both have an entry their values are added, and neither order nor grouping matters."""
    (task, language), deltas = (20, 45), []
    for n in (task, language):
        tuned, mask = masked(START, n)
        deltas.append(SparseDelta.between(START, tuned, mask))
    one, two = deltas
    shared = set(one.indices["up/kernel"].tolist()) & set(two.indices["up/kernel"].tolist())
    assert shared, "nothing overlaps"
    both = one + two
    assert bits(both) == bits(two + one)
    assert all((np.diff(np.asarray(x)) > 0).all() for x in both.indices.values())
    for a, b, c in zip(
        *map(jax.tree.leaves, (both.apply(START), one.apply(two.apply(START)), two.apply(one.apply(START)))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        np.testing.assert_allclose(b, c, rtol=0, atol=1e-6)
    half = one.scale(0.5)
    for a, b in zip(jax.tree.leaves((half + half).apply(START)), jax.tree.leaves(one.apply(START)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_whole_weights_are_copied_and_stay():
    ticket = lottery(training([]), START, entries=25, whole=["head"], frozen=["norm"])
    delta = SparseDelta.between(START, ticket.params, ticket.mask)
    assert set(delta.whole) == {"head/kernel"} and "norm/scale" not in delta.indices
    applied = delta.apply(START)
    assert bits(applied["head"]) == bits(ticket.params["head"])
    assert bits(delta.apply(START, whole=False)["head"]) == bits(START["head"])
    assert bits(delta.revert(applied)["head"]) == bits(applied["head"])
    assert bits(delta.scale(2.0).whole) == bits(delta.whole)
    with pytest.raises(ValueError, match="head/kernel is whole in both of these deltas"):
        delta + delta
    language = delta.replace(whole={})
    assert set((delta + language).whole) == {"head/kernel"}
    headless = {name: leaves for name, leaves in START.items() if name != "head"}
    assert set(delta.apply(headless, whole=False)) == {"up", "norm"}


def test_a_delta_goes_through_a_file(tmp_path):
    ticket = lottery(training([]), START, entries=25, whole=["head"], frozen=["norm"])
    delta = SparseDelta.between(START, ticket.params, ticket.mask)
    one, two = (delta.save(tmp_path / name) for name in ("one.safetensors", "two.safetensors"))
    assert one.read_bytes() == two.read_bytes()
    again = load_delta(one)
    assert jax.tree.structure(again) == jax.tree.structure(delta) and bits(again) == bits(delta)
    from safetensors.numpy import load_file, save_file

    stored = load_file(one)
    assert sum(x.nbytes for n, x in stored.items() if n.split(":")[0] in ("indices", "values")) == 8 * 25
    save_file({n: x for n, x in stored.items() if n != "values:up/kernel"}, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="broken.safetensors holds no values of up/kernel"):
        load_delta(tmp_path / "broken.safetensors")
    for wrong in ([7, 3], [3, 3], [-1, 3], [3, 48]):
        bad = {**stored, "indices:up/kernel": np.array(wrong, np.int32), "values:up/kernel": np.ones(2, np.float32)}
        save_file(bad, tmp_path / "bad.safetensors")
        with pytest.raises(
            ValueError, match="bad.safetensors: the entries of up/kernel are not ascending positions among 48"
        ):
            load_delta(tmp_path / "bad.safetensors")
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: 'w' is not part of a sparse delta"):
        load_delta(tmp_path / "other.safetensors")


def test_the_distance_is_a_mean_over_all_parameters():
    tuned = moved(START)
    apart = distances(START, tuned)
    size = sum(x.size for x in jax.tree.leaves(START))
    whole = sum(x.sum() for x in jax.tree.leaves(apart)) / size
    np.testing.assert_allclose(l1_distance(tuned, START), whole, rtol=1e-5)
    part = apart["up"]["kernel"].sum() + apart["up"]["bias"].sum()
    np.testing.assert_allclose(l1_distance(tuned, START, leave_out=["head", "norm"]), part / size, rtol=1e-5)
    gradient = jax.grad(lambda p: l1_distance(p, START))(tuned)
    np.testing.assert_allclose(np.abs(gradient["norm"]["scale"]), 1 / size, rtol=1e-5)
    still = jax.grad(lambda p: l1_distance(p, START))(START)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(still))


def test_bad_input_is_refused_by_name():
    tuned = moved(START)
    with pytest.raises(ValueError, match=r"top_changes\(entries=500\): there are 88 entries to choose from"):
        top_changes(START, tuned, entries=500)
    with pytest.raises(ValueError, match=r"top_changes\(density=0.0\)"):
        top_changes(START, tuned, density=0.0)
    with pytest.raises(ValueError, match=r"top_changes\(entries=0\)"):
        top_changes(START, tuned, entries=0)
    with pytest.raises(ValueError, match=r"whole='hed' matches no weight. Nearest paths: head"):
        top_changes(START, tuned, entries=5, whole=["hed"])
    with pytest.raises(ValueError, match="norm/scale is both whole and frozen"):
        allowed(START, whole=["norm"], frozen=["norm"])
    with pytest.raises(ValueError, match="the change of up/bias is not finite"):
        top_changes(START, {**tuned, "up": {**tuned["up"], "bias": tuned["up"]["bias"].at[0].set(jnp.nan)}}, entries=5)
    with pytest.raises(ValueError, match=r"up/bias has shape \(7,\) in the tuned parameters, expected \(8,\)"):
        top_changes(START, {**tuned, "up": {**tuned["up"], "bias": jnp.ones(7)}}, entries=5)
    with pytest.raises(ValueError, match="norm/scale is missing in the tuned parameters"):
        top_changes(START, {name: tuned[name] for name in ("up", "head")}, entries=5)
    mask = top_changes(START, tuned, entries=5)
    with pytest.raises(ValueError, match="mask_updates: the mask is of other parameters"):
        mask_updates({"up": mask["up"]}).init(START)
    with pytest.raises(ValueError, match="entries of head/kernel moved outside the mask"):
        SparseDelta.between(START, tuned, mask)
    delta = SparseDelta.between(START, tuned, None)
    with pytest.raises(ValueError, match=r"norm/scale has shape \(9,\) in these parameters, expected \(8,\)"):
        delta.apply({**START, "norm": {"scale": jnp.ones(9)}})
    with pytest.raises(ValueError, match="head/kernel is missing in these parameters"):
        delta.revert({name: START[name] for name in ("up", "norm")})
    with pytest.raises(ValueError, match="SparseDelta: the change of norm/scale is not finite"):
        SparseDelta.between(START, {**tuned, "norm": {"scale": jnp.full(8, jnp.nan)}})
    other = SparseDelta.between({"norm": {"scale": jnp.zeros(9)}}, {"norm": {"scale": jnp.ones(9)}}, None)
    with pytest.raises(ValueError, match=r"norm/scale has shape \(8,\) in one of these deltas and \(9,\) in the other"):
        delta + other
    for fields in ({"entries": 2, "rounds": 3}, {"entries": 9, "rounds": 0}):
        with pytest.raises(ValueError, match=rf"lottery\(rounds={fields['rounds']}\)"):
            lottery(training([]), START, **fields)
    assert lr.lt_sft.SparseDelta is SparseDelta
