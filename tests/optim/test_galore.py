"""GaLore: the subspace is the gradient's, the inner optimizer lives in it, and refreshes do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

import lowrank_jax as lr
from lowrank_jax.optim import galore, scale_by_adam_8bit
from lowrank_jax.optim.subspace import Bases, leading, project, project_back

EXACT = {"svd": "exact", "stagger": False, "scale": 1.0}
SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8)}
PARAMS = {
    name: {"kernel": kernel(*shape, seed=n), "bias": jnp.zeros(shape[1])}
    for n, (name, shape) in enumerate(SHAPES.items())
}


def gradients(seed, params=PARAMS):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), params)


def run(tx, steps, params=PARAMS, first_seed=100):
    """The updates of some steps on random gradients, and the last state."""
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(gradients(first_seed + step, params), state, params)
        seen.append(updates)
    return seen, state


@pytest.mark.parametrize("side", ["smaller", "larger", "input", "output", "both"])
def test_bases_are_orthonormal_and_of_the_chosen_side(side):
    _, state = run(galore(optax.identity(), 3, side=side, **EXACT), 1)
    expected = {
        "smaller": {"wide": "i", "tall": "o", "square": "i"},
        "larger": {"wide": "o", "tall": "i", "square": "i"},
        "input": dict.fromkeys(SHAPES, "i"), "output": dict.fromkeys(SHAPES, "o"), "both": dict.fromkeys(SHAPES, "io"),
    }[side]  # fmt: skip
    for name, (n_in, n_out) in SHAPES.items():
        bases = state.projected[f"{name}/kernel"].subspace
        assert (bases.inputs is not None, bases.outputs is not None) == ("i" in expected[name], "o" in expected[name])
        for basis, size in ((bases.inputs, n_in), (bases.outputs, n_out)):
            if basis is not None:
                assert basis.shape == (size, 3)
                np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)


@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
def test_the_subspace_is_that_of_the_gradients_leading_directions(side):
    """With no inner transform the update is the best approximation of that rank."""
    (updates,), _ = run(galore(optax.identity(), 2, side=side, **EXACT), 1)
    for name in SHAPES:
        u, s, vt = np.linalg.svd(np.asarray(gradients(100)[name]["kernel"], np.float64), full_matrices=False)
        np.testing.assert_allclose(updates[name]["kernel"], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


def test_at_full_rank_it_is_sgd_and_it_is_not_adam():
    """A rotated basis changes nothing for SGD, and everything for Adam: its first step is ``P sign(P^T G)``, not ``sign(G)``."""
    for side in ("smaller", "larger"):
        sizes = {"smaller": min, "larger": max}[side]
        for name, shape in SHAPES.items():
            params = {name: PARAMS[name]}
            g = gradients(100, params)[name]["kernel"]
            rank = min(sizes(shape), min(shape))
            if side == "smaller":
                (updates,), _ = run(galore(optax.sgd(1.0), rank, **{**EXACT, "scale": 0.5}, side=side), 1, params)
                np.testing.assert_allclose(updates[name]["kernel"], -0.5 * g, atol=1e-5)
            (updates,), state = run(galore(optax.scale_by_adam(eps=0.0), rank, side=side, **EXACT), 1, params)
            bases = state.projected[f"{name}/kernel"].subspace
            rotated = project_back(jnp.sign(project(g, bases)), bases)
            np.testing.assert_allclose(updates[name]["kernel"], rotated, atol=1e-4)
            assert np.abs(updates[name]["kernel"] - jnp.sign(g)).max() > 0.5


def test_size_and_rank_of_adams_first_step():
    (updates,), _ = run(galore(optax.scale_by_adam(eps=0.0), 3, **{**EXACT, "scale": 0.25}), 1)
    for name, shape in SHAPES.items():
        update = np.asarray(updates[name]["kernel"], np.float64)
        assert abs(np.linalg.norm(update) - 0.25 * np.sqrt(3 * max(shape))) < 1e-3
        assert np.linalg.matrix_rank(update, tol=1e-4) == 3
    np.testing.assert_allclose(np.abs(updates["wide"]["bias"]), 1, atol=1e-4)  # not projected, not scaled


def test_the_state_is_as_small_as_the_formula_says():
    params = {
        "x": {"kernel": jnp.zeros((60, 100))},
        "y": {"kernel": jnp.zeros((100, 60))},
        "z": {"kernel": jnp.zeros((70, 70))},
    }
    state = galore(optax.scale_by_adam(), 4).init(params)
    for path, site in lr.sites(params).items():
        small, large = sorted((site.n_in, site.n_out))
        held = [x for x in jax.tree.leaves(state.projected[path]) if x.ndim]
        assert sum(x.size for x in held) == 4 * small + 2 * 4 * large, path


@pytest.mark.parametrize("on_refresh", ["keep", "rotate"])
def test_a_quantised_subspace_is_a_quarter_as_large_and_nearly_the_same(on_refresh):
    params = {"x": {"kernel": kernel(256, 320)}}
    small, plain = (
        galore(optax.scale_by_adam(), 8, refresh_every=2, on_refresh=on_refresh, quantise_subspace=q)
        for q in (True, False)
    )
    held = [
        sum(x.nbytes for x in jax.tree.leaves(tx.init(params).projected["x/kernel"].subspace)) for tx in (small, plain)
    ]
    assert held[0] == 256 * 8 * (1 + 4 / 256) and held[1] == 256 * 8 * 4
    for a, b in zip(run(small, 3, params)[0], run(plain, 3, params)[0], strict=True):
        difference = np.linalg.norm(a["x"]["kernel"] - b["x"]["kernel"]) / np.linalg.norm(b["x"]["kernel"])
        assert 0 < difference < 0.1


def moments(state, name="wide"):
    return state.projected[f"{name}/kernel"].inner


def test_what_a_refresh_does_to_the_moments():
    """``keep`` goes on from the very numbers; ``reset`` starts anew, so the step is of full length again; ``rotate`` turns."""
    hows = ("keep", "reset", "rotate")
    states = {
        how: run(galore(optax.scale_by_adam(), 2, refresh_every=3, on_refresh=how, **EXACT), 3)[1] for how in hows
    }
    g = gradients(103)
    for how, state in states.items():
        tx = galore(optax.scale_by_adam(), 2, refresh_every=3, on_refresh=how, **EXACT)
        updates, after = tx.update(g, state, PARAMS)
        r = project(g["wide"]["kernel"], after.projected["wide/kernel"].subspace)
        old, new = moments(state), moments(after)
        assert (
            np.abs(
                after.projected["wide/kernel"].subspace.inputs - state.projected["wide/kernel"].subspace.inputs
            ).max()
            > 0.1
        )
        if how == "keep":
            np.testing.assert_allclose(new.mu, 0.9 * old.mu + 0.1 * r, rtol=1e-6, atol=1e-7)
            assert new.count == 4
        elif how == "reset":
            np.testing.assert_allclose(new.mu, 0.1 * r, rtol=1e-5, atol=1e-7)
            assert new.count == 1
            assert abs(np.linalg.norm(updates["wide"]["kernel"]) - np.sqrt(2 * 10)) < 1e-3
        else:
            c = np.asarray(
                after.projected["wide/kernel"].subspace.inputs.T @ state.projected["wide/kernel"].subspace.inputs
            )
            np.testing.assert_allclose(new.mu, 0.9 * c @ old.mu + 0.1 * r, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(new.nu, 0.999 * c**2 @ old.nu + 0.001 * r**2, rtol=1e-4, atol=1e-7)


def test_between_refreshes_the_subspace_stays_and_staggered_weights_take_turns():
    def changes(stagger, steps=9):
        tx = galore(optax.identity(), 2, refresh_every=4, svd="exact", stagger=stagger)
        state, changed, update = tx.init(PARAMS), [], jax.jit(tx.update)
        for step in range(steps):
            before = {path: p.subspace for path, p in state.projected.items()}
            _, state = update(gradients(step), state, PARAMS)
            same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))  # noqa: E731
            changed.append(sum(not same(before[path], p.subspace) for path, p in state.projected.items()))
        return changed

    assert changes(False) == [3, 0, 0, 0, 3, 0, 0, 0, 3]
    assert changes(True) == [3, 1, 1, 0, 1, 1, 1, 0, 1]


def test_layers_of_a_stack_have_subspaces_of_their_own():
    params = {"layers": {"up": {"kernel": kernel(4, 6, 8), "bias": jnp.zeros((4, 8))}}}
    tx = galore(optax.scale_by_adam(), 2, refresh_every=2, **EXACT)
    stacked, state = run(tx, 3, params)
    assert state.projected["layers/up/kernel"].subspace.inputs.shape == (4, 6, 2)
    for layer in range(4):
        one = {"up": {"kernel": params["layers"]["up"]["kernel"][layer]}}
        state = tx.init(one)
        for step, updates in enumerate(stacked):
            g = gradients(100 + step, params)["layers"]["up"]["kernel"][layer]
            alone, state = tx.update({"up": {"kernel": g}}, state, one)
            np.testing.assert_allclose(updates["layers"]["up"]["kernel"][layer], alone["up"]["kernel"], atol=1e-5)


def test_it_equals_optaxs_own_on_the_longer_side():
    tx = galore(optax.scale_by_adam(), 3, refresh_every=100, side="larger", **EXACT)
    other = optax.contrib.scale_by_galore(3, 100, 1.0, optax.scale_by_adam())
    params = {name: {"kernel": leaves["kernel"]} for name, leaves in PARAMS.items()}
    ours, _ = run(tx, 4, params)
    theirs, _ = run(other, 4, params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_randomized_subspace_holds_what_the_exact_one_does():
    spectrum = 0.8 ** np.arange(40)
    g = kernel(60, 40, seed=1) @ jnp.diag(jnp.asarray(spectrum, jnp.float32)) @ kernel(40, 80, seed=2)
    energy = [
        float((project(g, leading(g, 8, "smaller", jax.random.key(0), method)) ** 2).sum())
        for method in ("exact", "randomized")
    ]
    assert 0.999 < energy[1] / energy[0] <= 1 + 1e-5


def test_more_power_iterations_find_more_of_a_slow_spectrum():
    g = kernel(200, 300, seed=3) * jnp.linspace(1, 0.5, 300)
    held = []
    for power_iterations in (1, 4):
        tx = galore(optax.identity(), 8, scale=1.0, power_iterations=power_iterations, targets=["w"])
        params = {"w": {"kernel": g}}
        held.append(float((tx.update(params, tx.init(params), params)[0]["w"]["kernel"] ** 2).sum()))
    assert held[1] > 1.02 * held[0]


def test_it_trains_and_weight_decay_reaches_the_whole_weight():
    tx = optax.chain(
        galore(optax.scale_by_adam(), 2), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.1)
    )
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["tall"]["kernel"], -0.05 * PARAMS["tall"]["kernel"], rtol=1e-5)
    target, params = kernel(6, 10, seed=7) @ kernel(10, 10, seed=8), {"w": {"kernel": jnp.zeros((6, 10))}}
    loss = lambda p: ((p["w"]["kernel"] - target) ** 2).mean()  # noqa: E731
    tx = optax.chain(
        galore(optax.scale_by_adam(), 2, scale=1.0, refresh_every=10),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, 500)),
    )
    state, first = tx.init(params), loss(params)
    step = jax.jit(lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(jax.grad(loss)(p), s, p)))
    for _ in range(500):
        params, state = step(params, state)
    assert loss(params) < 0.05 * first


def test_bfloat16_gradients_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    (updates,), state = run(galore(optax.scale_by_adam(), 2), 1, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.projected["wide/kernel"].subspace.inputs.dtype == jnp.bfloat16


def test_subspace_and_moments_are_divided_as_their_weight_is():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    kernel = jax.device_put(np.ones((3, 64, 128), np.float32), jax.sharding.NamedSharding(mesh, spec))
    bias = jax.device_put(np.ones((3, 128), np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    state = galore(optax.scale_by_adam(), 8).init({"w": {"kernel": kernel, "bias": bias}}).projected["w/kernel"]
    parts = [x.addressable_shards[0].data.shape for x in (state.subspace.inputs, state.inner.mu, state.inner.nu)]
    assert parts == [(3, 16, 4), (3, 2, 64), (3, 2, 64)]


@pytest.mark.parametrize("side", ["smaller", "larger"])
def test_a_sharded_refresh_gathers_no_whole_gradient(side):
    """The gradient stays where it lies; only sketches as narrow as the rank travel."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    whole = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    placed = {"w": {"kernel": jax.device_put(whole, sharding)}}
    tx = galore(optax.scale_by_adam(), 8, side=side)
    state = tx.init(placed)
    text = jax.jit(tx.update).lower(placed, state, placed).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    sizes = [
        int(np.prod([int(n) for n in line.split("f32[")[1].split("]")[0].split(",")]))
        for line in gathered
        if "f32[" in line
    ]
    assert max(sizes, default=0) <= 1024 * (8 + 16), gathered
    expected = {"w": {"kernel": jnp.asarray(whole)}}
    got, want = (jax.jit(tx.update)(g, tx.init(g), g)[0]["w"]["kernel"] for g in (placed, expected))
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"galore\(rank=0, refresh_every=200\)"):
        galore(optax.scale_by_adam(), 0)
    with pytest.raises(ValueError, match=r"galore\(rank=2, refresh_every=0\)"):
        galore(optax.scale_by_adam(), 2, refresh_every=0)
    with pytest.raises(ValueError, match=r"galore\(side='left'\): expected one of 'smaller', 'larger'"):
        galore(optax.scale_by_adam(), 2, side="left")
    with pytest.raises(ValueError, match=r"galore\(rank=7\) at tall/kernel: a \[10, 6\] gradient has only 6"):
        galore(optax.scale_by_adam(), 7, targets=["tall"]).init(PARAMS)
    with pytest.raises(ValueError, match=r"targets=\['wife'\]\) matches no weight. Nearest paths: wide"):
        galore(optax.scale_by_adam(), 2, targets=["wife"]).init(PARAMS)
    with pytest.raises(ValueError, match=r"wide/bias of shape \(10,\) is not known to be a matrix"):
        galore(optax.scale_by_adam(), 2, targets=["wide/(kernel|bias)"]).init(PARAMS)
    assert set(
        galore(optax.scale_by_adam(), 2, targets=["wide/(kernel|bias)"], allow_other=True).init(PARAMS).projected
    ) == {"wide/kernel"}
    state = galore(optax.scale_by_adam(), 2).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"the state's subspace for square/kernel has shape \[\(8, 2\)\], expected \[\(8, 3\)\]"
    ):
        galore(optax.scale_by_adam(), 3).update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="holds no subspace for square/kernel"):
        galore(optax.scale_by_adam(), 2).update(PARAMS, state._replace(projected={}), PARAMS)
    with pytest.raises(ValueError, match="holds a subspace for square/kernel, which is not targeted"):
        galore(optax.scale_by_adam(), 2, targets=["wide", "tall"]).update(PARAMS, state, PARAMS)
    packed = scale_by_adam_8bit(min_size=1)
    with pytest.raises(
        ValueError, match=r"galore\(on_refresh='rotate'\): the inner state of square/kernel has arrays of shapes"
    ):
        galore(packed, 2, on_refresh="rotate").init(PARAMS)
    assert galore(packed, 2, on_refresh="reset").init(PARAMS)
    tx = galore(optax.adamw(1e-3), 2)
    with pytest.raises(ValueError, match="the inner transform needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_coordinates_turn_with_the_subspace():
    old, new = (Bases(jnp.linalg.qr(kernel(6, 6, seed=n))[0]) for n in (1, 2))
    r = kernel(6, 4, seed=3)
    seen = project_back(r, lr.optim.subspace.turn(old, new))
    np.testing.assert_allclose(project_back(seen, new), project_back(r, old), atol=1e-5)
