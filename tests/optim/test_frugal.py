"""FRUGAL: one part with state, one without, every entry in just one of them, and a new choice at every refresh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

from lowrank_jax.optim import frugal

COORDINATES = ["inputs", "outputs", "entries", "blocks"]
PARAMS = {
    "layers": {"up": {"kernel": kernel(4, 8, 12), "bias": jnp.zeros((4, 12))}},
    "x": {"kernel": kernel(8, 12, seed=1)},
    "y": {"kernel": kernel(8, 12, seed=2)},
    "z": {"kernel": kernel(12, 8, seed=3)},
}
KERNELS = ("layers/up", "x", "y", "z")
ADAM = {"inner": optax.scale_by_adam(eps=0.0)}


def gradients(seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), PARAMS)


def run(tx, steps, params=PARAMS):
    """Parameters after some steps of learning rate 1, and the last state."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def kernels(tree):
    return {"layers/up": tree["layers"]["up"]["kernel"], **{n: tree[n]["kernel"] for n in "xyz"}}


@pytest.mark.parametrize("subspace", COORDINATES)
def test_all_of_it_is_adam_and_nothing_of_it_is_sign_descent(subspace):
    all_of_it, _ = run(frugal(density=1.0, subspace=subspace, **ADAM), 4)
    adam, _ = run(optax.scale_by_adam(eps=0.0), 4)
    for a, b in zip(jax.tree.leaves(all_of_it), jax.tree.leaves(adam), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    nothing = frugal(density=0.0, subspace=subspace, **ADAM)
    updates, state = nothing.update(gradients(0), nothing.init(PARAMS), PARAMS)
    for name, g in kernels(gradients(0)).items():
        assert (kernels(updates)[name] == jnp.sign(g)).all()
    assert sum(x.size for x in jax.tree.leaves(state.projected) if x.ndim) == 0


@pytest.mark.parametrize("subspace", ["svd", "random"])
def test_no_directions_are_sign_descent_too(subspace):
    tx = frugal(density=0.0, subspace=subspace, **ADAM)
    updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    for name, g in kernels(gradients(0)).items():
        assert (kernels(updates)[name] == jnp.sign(g)).all()


@pytest.mark.parametrize(
    ("subspace", "share"), [("inputs", 0.25), ("outputs", 0.25), ("entries", 0.25), ("blocks", 0.5)]
)
def test_every_entry_is_updated_by_one_of_the_two(subspace, share):
    """Free entries move by 0.5, the others by one (Adam's first step)."""
    tx = frugal(density=share, subspace=subspace, free_scale=0.5, **ADAM)
    updates, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    size = with_state = 0
    for name, update in kernels(updates).items():
        sizes = np.abs(np.asarray(update))
        np.testing.assert_allclose(np.minimum(np.abs(sizes - 0.5), np.abs(sizes - 1)), 0, atol=1e-5)
        assert (jnp.sign(update) == jnp.sign(kernels(gradients(0))[name])).all()
        size, with_state = size + sizes.size, with_state + (sizes > 0.75).sum()
    held = sum(x.size for unit in state.projected.values() for x in jax.tree.leaves(unit.inner) if x.ndim)
    assert held == 2 * with_state and abs(with_state / size - share) < 0.08


def test_the_features_are_those_of_their_axis():
    for subspace, axis in (("inputs", -1), ("outputs", -2)):
        tx = frugal(density=0.25, subspace=subspace, free_scale=0.5, **ADAM)
        updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
        for update in kernels(updates).values():
            sizes = np.abs(np.asarray(update)) > 0.75
            assert (sizes.all(axis) == sizes.any(axis)).all()
            n = update.shape[-2 if axis == -1 else -1]
            assert (sizes.all(axis).sum(-1) == int(0.25 * n)).all()
    layers = np.abs(np.asarray(kernels(updates)["layers/up"])).argmax(-1)[:, 0]
    assert len(set(layers.tolist())) > 1  # each layer has features of its own


def test_the_rest_of_a_singular_subspace_takes_its_sign_in_the_weights_own_coordinates():
    """Its sign is not orthogonal to the subspace; projecting it again, or signing in the complement's basis, would make it so."""
    tx = frugal(density=0.25, subspace="svd", svd="exact", scale=0.0, **ADAM)
    updates, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    for name, g in kernels(gradients(0)).items():
        bases = state.projected[f"{name}/kernel"].subspace
        p, q = bases.inputs, bases.outputs
        inside = p @ (jnp.swapaxes(p, -1, -2) @ g) if p is not None else (g @ q) @ jnp.swapaxes(q, -1, -2)
        assert (jnp.sign(g - inside) == kernels(updates)[name]).mean() > 0.99
        overlap = jnp.swapaxes(p, -1, -2) @ kernels(updates)[name] if p is not None else kernels(updates)[name] @ q
        assert np.abs(overlap).max() > 0.1


@pytest.mark.parametrize("subspace", ["inputs", "random", "svd"])
def test_a_refresh_starts_anew(subspace):
    """Bias correction starts again too: a step of full length."""
    tx = frugal(density=0.5, subspace=subspace, refresh_every=3, free=None, **ADAM)
    _, state = run(tx, 3)
    before = state.projected["x/kernel"]
    updates, after = tx.update(gradients(7), state, PARAMS)
    now = after.projected["x/kernel"]
    assert before.inner.count == 3 and now.inner.count == 1
    changed = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(before.subspace), jax.tree.leaves(now.subspace), strict=True)
    ]
    assert all(changed)
    size = now.inner.mu.size
    assert abs(np.linalg.norm(updates["x"]["kernel"]) - np.sqrt(size)) < 1e-3
    keeping = frugal(density=0.5, subspace=subspace, refresh_every=3, free=None, on_refresh="keep", **ADAM)
    _, state = run(keeping, 4)
    assert state.projected["x/kernel"].inner.count == 4


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1], [2, 3], [4, 5], [0, 1]]),
        ("descending", [[4, 5], [2, 3], [0, 1], [4, 5]]),
        ("mirror", [[0, 5], [1, 4], [2, 3], [0, 5]]),
    ],
)
def test_blocks_take_turns(order, expected):
    """Six matrices of one size: four layers of a stack and two others. The one of another size is on its own."""
    tx = frugal(
        density=1 / 3,
        subspace="blocks",
        order=order,
        refresh_every=1,
        targets=["layers/up", "x", "y"],
        free=None,
        **ADAM,
    )
    state, seen = tx.init(PARAMS), []
    for step in range(4):
        updates, state = tx.update(gradients(step), state, PARAMS)
        matrices = [*kernels(updates)["layers/up"], updates["x"]["kernel"], updates["y"]["kernel"]]
        seen.append([n for n, matrix in enumerate(matrices) if (matrix != 0).any()])
    assert seen == expected


def test_random_directions_are_orthonormal_and_kept_between_refreshes():
    tx = frugal(density=0.25, subspace="random", refresh_every=10, **ADAM)
    states = [run(tx, n)[1].projected["layers/up/kernel"].subspace for n in (1, 3)]
    assert (states[0].inputs == states[1].inputs).all()
    p = np.asarray(states[0].inputs)
    np.testing.assert_allclose(np.einsum("lir,lis->lrs", p, p), np.broadcast_to(np.eye(2), (4, 2, 2)), atol=1e-5)


def test_plain_gradient_descent_for_the_rest():
    tx = frugal(optax.identity(), 0.25, free="sgd")
    updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients(0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 1.5}, r"frugal\(density=1.5\): expected a share"),
        ({"subspace": "columns"}, r"frugal\(subspace='columns'\): expected one of 'svd', 'random', 'inputs'"),
        ({"free": "adam"}, r"frugal\(free='adam'\): expected one of 'sign', 'sgd', None"),
        ({"refresh_every": 0}, r"frugal\(refresh_every=0\)"),
        ({"on_refresh": "rotate"}, r"frugal\(on_refresh='rotate'\)"),
        ({"subspace": "blocks", "order": "mirror", "density": 0.5}, "3 of the 6 matrices of a size would be updated"),
        (
            {"targets": [".*/bias"]},
            r"frugal\(targets=\['.*/bias'\]\): layers/up/bias of shape \(4, 12\) is not known to be a matrix",
        ),
    ],
)
def test_bad_input_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        frugal(**{**ADAM, **fields}).init(PARAMS)
