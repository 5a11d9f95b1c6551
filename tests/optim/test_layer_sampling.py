"""LISA: only the layers that were drawn move, their state takes no more room than they need, and everybody's turn comes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

import lowrank_jax as lr
from lowrank_jax.optim import Layers, lisa

DEPTH = 6


def loop():
    layer = lambda n: {"kernel": kernel(4, 4, seed=n), "bias": jnp.ones(4)}  # noqa: E731
    return {"embed": kernel(5, 4), "head": kernel(4, 3), **{f"layers_{n}": layer(n) for n in range(DEPTH)}}


def scanned(params):
    stack = jax.tree.map(lambda *x: jnp.stack(x), *(params[f"layers_{n}"] for n in range(DEPTH)))
    return {"embed": params["embed"], "head": params["head"], "layers": stack}


SITES = lr.sites(scanned(loop()), declare={"layers/bias": "bo", "layers/kernel": "bio"})
MODELS = {"loop": (loop(), None), "scanned": (scanned(loop()), SITES)}


def gradients(params, seed):
    random = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), loop())
    return scanned(drawn) if "layers" in params else drawn


def run(tx, params, steps):
    """Parameters after each step, and the state before each."""
    state, update, seen, states = tx.init(params), jax.jit(tx.update), [], []
    for step in range(steps):
        states.append(state)
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, [*states, state]


def moved(before, after):
    """The numbers of the layers that differ at all."""
    if "layers" not in before:
        before, after = scanned(before), scanned(after)
    pairs = zip(*map(jax.tree.leaves, (before["layers"], after["layers"])), strict=True)
    return set(np.flatnonzero(np.any([(a != b).reshape(DEPTH, -1).any(1) for a, b in pairs], 0)).tolist())


def test_norms_of_a_scanned_stack_belong_to_its_layers():
    """No site says that they are stacked: nothing multiplies by them as a matrix."""
    config = lr.models.LlamaConfig.tiny(scan_layers=True, num_hidden_layers=3)
    shapes = lr.models.param_shapes(config)
    sites = lr.linen.sites(lr.models.build(config), shapes, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    inside = Layers(shapes, sites).paths()
    assert inside == {path for path in lr.sites(shapes) if path.startswith("layers/")}
    assert "layers/input_norm/scale" in inside and "norm/scale" not in inside


@pytest.mark.parametrize("policy", ["reset", "keep"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_layers_drawn_move_and_everything_outside_does(name, policy):
    """Weight decay is on: it has to spare them too."""
    params, sites = MODELS[name]
    tx = lisa(optax.adamw(0.1, weight_decay=0.5), active=2, period=3, state_policy=policy, sites=sites)
    seen, states = run(tx, params, 7)
    drawn = [set(state.layers.tolist()) for state in states[:-1]]
    assert drawn[0] == drawn[1] == drawn[2] and drawn[3] == drawn[5] and len({frozenset(d) for d in drawn}) > 1
    for before, after, chosen in zip([params, *seen], seen, drawn, strict=False):
        assert moved(before, after) == chosen and len(chosen) == 2
        assert (after["embed"] != before["embed"]).all() and (after["head"] != before["head"]).all()


def test_scan_and_loop_are_one():
    (a, _), (b, _) = (run(lisa(optax.adamw(0.1), 2, 2, sites=sites), params, 5) for params, sites in MODELS.values())
    for n in range(DEPTH):
        np.testing.assert_allclose(a[-1][f"layers_{n}"]["kernel"], b[-1]["layers"]["kernel"][n], rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_in_one_period_is_the_optimizer_itself(name):
    params, sites = MODELS[name]
    ours, _ = run(lisa(optax.adamw(0.1), DEPTH, 100, sites=sites), params, 4)
    plain, _ = run(optax.adamw(0.1), params, 4)
    for a, b in zip(jax.tree.leaves(ours[-1]), jax.tree.leaves(plain[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_has_room_for_the_layers_drawn_only():
    params = {"head": jnp.zeros(7), **{f"layers_{n}": {"kernel": jnp.zeros((16, 16))} for n in range(DEPTH)}}

    def size(policy):
        state = lisa(optax.adam(0.1), 2, state_policy=policy).init(params)
        return sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)

    assert size("reset") == 2 * 2 * 256 and size("keep") == 2 * DEPTH * 256


def test_what_a_layer_remembers_when_its_turn_comes_again():
    params, _ = MODELS["loop"]
    fresh, states = run(lisa(optax.adam(0.1), 2, 3, state_policy="reset"), params, 3)
    assert states[2].slots[0].count.tolist() == [2, 2]
    assert states[3].slots[0].count.tolist() == [0, 0] and not jax.tree.leaves(states[3].slots[0].mu)[0].any()
    _, states = run(lisa(optax.adam(0.1), 2, 1, state_policy="keep"), params, 30)
    counts = states[-1].slots[0].count
    assert counts.sum() == 60 and counts.min() > 0
    turns = np.bincount(np.concatenate([state.layers for state in states[:-1]]), minlength=DEPTH)
    assert counts.tolist() == turns.tolist()


def test_every_layers_turn_comes_equally_often():
    """Chi-squared with five degrees of freedom; 0.1% of honest draws would be above 20.5."""
    params = {f"layers_{n}": {"kernel": jnp.zeros(1)} for n in range(DEPTH)}
    tx = lisa(optax.sgd(0.1), 2, 1)

    def step(state, _):
        return tx.update(params, state, params)[1], state.layers

    _, drawn = jax.lax.scan(step, tx.init(params), None, 1200)
    assert all(len(set(pair)) == 2 for pair in drawn.tolist())
    counts = np.bincount(np.ravel(drawn), minlength=DEPTH)
    assert ((counts - 400) ** 2 / 400).sum() < 20.5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_drawn_layers_alone(name):
    """Differentiating with respect to what was taken gives what taking from the dense gradient gives."""
    params, sites = MODELS[name]
    layers, which = Layers(params, sites), jnp.array([1, 4])
    loss = lambda p: sum((x**2).sum() * n for n, x in enumerate(jax.tree.leaves(p), 1))  # noqa: E731
    alone = jax.grad(lambda taken: loss(layers.put(params, taken, which)))(layers.take(params, which))
    dense = layers.take(jax.grad(loss)(params), which)
    assert set(alone) == set(dense)
    for role, x in alone.items():
        np.testing.assert_allclose(x, dense[role], rtol=1e-6)
    back = layers.put(params, layers.take(params, which), which)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back, params))


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"lisa\(active=0, period=20\)"):
        lisa(optax.sgd(1.0), 0)
    with pytest.raises(ValueError, match=r"lisa\(state_policy='drop'\)"):
        lisa(optax.sgd(1.0), state_policy="drop")
    with pytest.raises(ValueError, match=r"lisa\(active=7\): the model has only 6 layers"):
        lisa(optax.sgd(1.0), 7).init(loop())
    with pytest.raises(ValueError, match="No layers found"):
        lisa(optax.sgd(1.0)).init({"x": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"layers_\{\}/extra is not in each of the 6 layers"):
        Layers({**loop(), "layers_3": {"kernel": kernel(4, 4), "bias": jnp.ones(4), "extra": jnp.ones(2)}})
