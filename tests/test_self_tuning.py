"""Self-Tuning Networks: layers that respond to hyper-parameters, and the two alternating steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

from lowrank_jax.self_tuning import (
    HyperConv,
    HyperDense,
    HyperParameters,
    Range,
    constrain,
    entropy,
    hyper_parameters,
    is_validation_step,
    perturb,
    self_tuning,
    unconstrain,
)

KEY = jax.random.key(0)

# The layers.


def random_params(layer, x, h):
    """Parameters none of which is near its start, so that every term shows."""
    params = layer.init(KEY, x, h)
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [leaf + kernel(*leaf.shape, seed=n) for n, leaf in enumerate(leaves)])


@pytest.mark.parametrize("middle", [(), (4,)])
def test_dense_is_the_formula_row_by_row(middle):
    x, h = kernel(5, *middle, 6), kernel(5, 2, seed=1)
    layer = HyperDense(3)
    params = random_params(layer, x, h)
    y = layer.apply(params, x, h)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params["params"].items()}
    for n in range(5):
        gates = [np.asarray(h[n], np.float64) @ p[name] for name in ("kernel_gate", "bias_gate")]
        plain = p["scale"] * (x[n] @ p["kernel"] + p["bias"])
        np.testing.assert_allclose(
            y[n], plain + gates[0] * (x[n] @ p["hyper_kernel"]) + gates[1] * p["hyper_bias"], rtol=2e-4
        )
    without = HyperDense(3, use_bias=False)
    assert set(without.init(KEY, x, h)["params"]) == {"kernel", "hyper_kernel", "kernel_gate", "scale"}


@pytest.mark.parametrize("options", [{}, {"strides": 2, "padding": "VALID"}, {"feature_group_count": 2, "padding": 1}])
def test_convolution_is_flax_s_with_gated_channels(options):
    x, h = kernel(3, 8, 7, 4), kernel(3, 2, seed=1)
    layer = HyperConv(6, (3, 2), **options)
    params = random_params(layer, x, h)
    y = jax.jit(layer.apply)(params, x, h)
    p = params["params"]

    def conv(name, bias):
        return nn.Conv(6, (3, 2), **options).apply({"params": {"kernel": p[name], "bias": bias}}, x)

    gate = lambda name: (h @ p[name])[:, None, None, :]  # noqa: E731
    expected = p["scale"] * conv("kernel", p["bias"]) + gate("kernel_gate") * conv("hyper_kernel", jnp.zeros(6))
    np.testing.assert_allclose(y, expected + gate("bias_gate") * p["hyper_bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layer", "shape"), [(HyperDense(300), (4, 50)), (HyperConv(300, (2, 5)), (4, 6, 6, 5))])
def test_the_start_and_its_size(layer, shape):
    p = layer.init(KEY, jnp.ones(shape), jnp.ones((4, 3)))["params"]
    for name in ("kernel", "hyper_kernel", "bias", "hyper_bias"):
        bound = 1 / np.sqrt(50)
        assert np.abs(p[name]).max() <= bound and np.abs(p[name]).max() > 0.97 * bound
        assert abs(np.std(p[name]) - bound / np.sqrt(3)) < 0.1 * bound
    for name in ("kernel_gate", "bias_gate"):
        assert p[name].shape == (3, 300) and 0.0093 < np.std(p[name]) < 0.0107
    assert p["scale"] == 1
    # Twice the weights, two gates for each output and hyper-parameter, and a scale.
    assert sum(x.size for x in jax.tree.leaves(p)) == 2 * (50 * 300 + 300) + 2 * 300 * 3 + 1


def test_without_gates_it_is_the_plain_layer_times_the_scale_and_does_not_see_the_hyper_parameters():
    x, h = kernel(5, 6), kernel(5, 2, seed=1)
    p = random_params(HyperDense(3), x, h)["params"] | {
        "kernel_gate": jnp.zeros((2, 3)),
        "bias_gate": jnp.zeros((2, 3)),
    }
    plain = nn.Dense(3).apply({"params": {"kernel": p["kernel"], "bias": p["bias"]}}, x)
    np.testing.assert_allclose(HyperDense(3).apply({"params": p}, x, h), p["scale"] * plain, rtol=1e-5)
    slope = jax.grad(lambda h: jnp.sum(HyperDense(3).apply({"params": p}, x, h) ** 2))
    assert not slope(h).any()


def test_half_precision_and_bad_shapes():
    x, h = kernel(5, 6), kernel(5, 2, seed=1)
    for layer, x in (
        (HyperDense(3, dtype=jnp.bfloat16), kernel(5, 6)),
        (HyperConv(3, (2,), dtype=jnp.bfloat16), kernel(5, 9, 6)),
    ):
        params = random_params(layer, x, h)
        y, exact = layer.apply(params, x, h), layer.clone(dtype=jnp.float32).apply(params, x, h)
        assert y.dtype == jnp.bfloat16 and params["params"]["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        assert layer.clone(dtype=None).apply(narrow, x.astype(jnp.bfloat16), h).dtype == jnp.bfloat16
    for layer, x in ((HyperDense(3), kernel(5, 6)), (HyperConv(3, (2,)), kernel(5, 9, 6))):
        with pytest.raises(ValueError, match=r"h of shape \[2\].*\[5, n_h\]"):
            layer.init(KEY, x, h[0])
        with pytest.raises(ValueError, match=r"h of shape \[4, 2\].*\[5, n_h\]"):
            layer.init(KEY, x, h[:4])
    with pytest.raises(ValueError, match=r"HyperConv: x of shape \[5, 6\].*\[batch, 2 spatial axes, channels\]"):
        HyperConv(3, (2, 2)).init(KEY, kernel(5, 6), h)


# Hyper-parameters.

RANGES = (Range(0.0, 0.9), Range(1.0), Range(high=-2.0), Range(), Range(0.0, 8.0, integer=True))


def test_ranges_hold_and_are_inverted():
    h = 5 * kernel(200, 5)
    got = np.asarray(constrain(h, RANGES))
    assert (got[:, 0] >= 0).all() and (got[:, 0] <= 0.9).all() and got[:, 0].std() > 0.2
    assert (got[:, 1] >= 1).all() and (got[:, 2] <= -2).all() and (got[:, 3] == h[:, 3]).all()
    assert set(got[:, 4]) == set(range(8))
    assert constrain(jnp.full(5, 60.0), RANGES)[4] == 7  # where the sigmoid has rounded to 1
    values = jnp.array([0.05, 3.0, -2.5, 7.0, 4.5])
    start = unconstrain(values, RANGES)
    np.testing.assert_allclose(constrain(start, RANGES), values.at[4].set(4.0), rtol=1e-5)
    np.testing.assert_allclose(constrain(start, [r._replace(integer=False) for r in RANGES]), values, rtol=1e-5)
    with pytest.raises(ValueError, match="unconstrain: value 1 is 0.5, expected above 1.0"):
        unconstrain(values.at[1].set(0.5), RANGES)
    with pytest.raises(ValueError, match="constrain: 5 hyper-parameters and 2 ranges"):
        constrain(h, RANGES[:2])
    with pytest.raises(ValueError, match=r"constrain: Range\(low=2.0, high=1.0.*below"):
        constrain(h[:, :1], [Range(2.0, 1.0)])


def test_perturbations_are_of_each_example_and_of_the_scales_given():
    hyper = hyper_parameters(jnp.array([1.0, -2.0]), scale=jnp.array([0.5, 0.05]))
    h = np.asarray(perturb(KEY, hyper, 20_000))
    assert h.shape == (20_000, 2) and len(np.unique(h[:, 0])) > 19_000  # the separating check: not one for all
    np.testing.assert_allclose(h.mean(0), [1.0, -2.0], atol=0.02)
    np.testing.assert_allclose(h.std(0), [0.5, 0.05], rtol=0.03)
    assert abs(np.corrcoef(h.T)[0, 1]) < 0.03
    still = HyperParameters(hyper.value, jnp.full(2, -np.inf))
    assert (perturb(KEY, still, 3) == hyper.value).all()
    expected = np.log(0.5 * np.sqrt(2 * np.pi * np.e)) + np.log(0.05 * np.sqrt(2 * np.pi * np.e))
    assert float(entropy(hyper)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="hyper_parameters.*scale.*above 0"):
        hyper_parameters(jnp.zeros(2), scale=0.0)


# The steps.


def quadratic(params, h, batch, key=None):
    """A loss with a gradient for everything."""
    return jnp.mean((batch["x"] @ params["w"] + h[:, 0] * params["u"] - batch["y"]) ** 2)


BATCH = {"x": kernel(6, 3), "y": kernel(6, seed=1)}


def tuner(train=quadratic, validation=quadratic, **options):
    return self_tuning(train, validation, optax.sgd(0.1, momentum=0.9), optax.adam(0.05), **options)


TUNE = tuner()
TRAIN, VALIDATE = jax.jit(TUNE.train_step), jax.jit(TUNE.validation_step)
VALIDATE_FIXED = jax.jit(tuner(tune_scale=False).validation_step)


def start(tune=TUNE):
    return tune.init({"w": kernel(3, seed=2), "u": jnp.ones(())}, hyper_parameters(jnp.array([0.3])))


def changed(before, after):
    return {name for name in before._fields if not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(),
            getattr(before, name), getattr(after, name)))}  # fmt: skip


def test_each_step_updates_its_own_half():
    state = start()
    trained, value = TRAIN(state, KEY, BATCH)
    assert changed(state, trained) == {"params", "inner"}
    tuned, _ = VALIDATE(state, KEY, BATCH)
    assert changed(state, tuned) == {"hyper", "outer"}
    assert (tuned.hyper.raw_scale != state.hyper.raw_scale).all() and (tuned.hyper.value != state.hyper.value).all()
    fixed, _ = VALIDATE_FIXED(state, KEY, BATCH)
    assert (fixed.hyper.raw_scale == state.hyper.raw_scale).all() and (fixed.hyper.value != state.hyper.value).all()
    h = perturb(KEY, state.hyper, 6)
    assert trained.params["w"].shape == (3,) and value.shape == ()
    assert not (h[0] == h[1]).any()


def test_losses_see_a_row_of_hyper_parameters_for_each_example():
    seen = []

    def spy(params, h, batch, key=None):
        seen.append(h)
        return quadratic(params, h, batch)

    state = start()
    tuner(train=spy).train_step(state, KEY, BATCH)
    tuner(validation=spy).validation_step(state, KEY, BATCH)
    values = [np.unique(np.asarray(jax.lax.stop_gradient(h)).ravel()).size for h in seen[:1]]
    assert values == [6] and [h.shape for h in seen] == [(6, 1)] * 2


def test_validation_is_at_perturbed_hyper_parameters_if_their_scale_is_tuned():
    state, keys = start(), (KEY, jax.random.key(1))
    drawn = [float(VALIDATE(state, key, BATCH)[1]) for key in keys]
    fixed = [float(VALIDATE_FIXED(state, key, BATCH)[1]) for key in keys]
    assert drawn[0] != drawn[1]
    assert fixed[0] == fixed[1] == pytest.approx(float(quadratic(state.params, jnp.full((6, 1), 0.3), BATCH)), rel=1e-5)


def test_the_entropy_is_subtracted():
    """With nothing else in the loss the scale grows, by the gradient of the entropy alone."""
    nothing = lambda params, h, batch: jnp.zeros(())  # noqa: E731
    tune = self_tuning(quadratic, nothing, optax.sgd(0.1), optax.sgd(1.0), entropy_weight=0.25)
    state = start(tune)
    after, value = tune.validation_step(state, KEY, BATCH)
    raw = float(state.hyper.raw_scale[0])
    slope = 1 / (1 + np.exp(-raw)) / np.log1p(np.exp(raw))
    assert float(after.hyper.raw_scale[0]) == pytest.approx(raw + 0.25 * slope, rel=1e-5)
    assert float(value) == 0 and (after.hyper.value == state.hyper.value).all()


def test_training_needs_no_gradient_by_the_hyper_parameters():
    """A discrete hyper-parameter, and a loss whose gradient by h would be NaN."""

    def train(params, h, batch, key):
        steps = constrain(h, [Range(0.0, 4.0, integer=True)])[:, 0]
        return quadratic(params, jnp.zeros_like(h), batch) + jnp.sum(params["w"] ** 2) * jnp.mean(
            jnp.sqrt(jnp.floor(steps * 0))
        )

    state, value = jax.jit(tuner(train=train).train_step)(start(), KEY, BATCH)
    assert np.isfinite(value) and np.isfinite(state.params["w"]).all()


def test_the_turns():
    turns = jax.jit(lambda step: is_validation_step(step, warm_up=4, train_steps=2, validation_steps=1))
    assert [bool(turns(n)) for n in range(11)] == [False] * 4 + [False, False, True] * 2 + [False]
    assert [bool(is_validation_step(n, train_steps=1, validation_steps=2)) for n in range(4)] == [
        False,
        True,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="is_validation_step.*train_steps=0"):
        is_validation_step(0, train_steps=0)


def test_bad_batches_and_settings_are_refused():
    with pytest.raises(ValueError, match=r"self_tuning: the batch has leading axes \[4, 6\]"):
        tuner().train_step(start(), KEY, {"x": BATCH["x"], "y": jnp.ones(4)})
    with pytest.raises(ValueError, match="self_tuning: the batch holds no array with a leading axis"):
        tuner().validation_step(start(), KEY, {"x": jnp.ones(())})
    with pytest.raises(ValueError, match="entropy_weight=-1"):
        tuner(entropy_weight=-1)


# Ridge regression with a diagonal design, whose best response is known: w = w_ols * sigmoid(log s^2 - h) for a penalty of exp(h).

S = jnp.array([0.3, 0.7, 1.0, 1.6, 3.0])
W_OLS = jnp.array([1.0, -0.8, 1.5, 0.5, -1.2])
COPIES = 40
RIDGE = {"x": jnp.tile(jnp.diag(S), (COPIES, 1)), "s": jnp.tile(S, COPIES), "y": jnp.tile(S * W_OLS, COPIES)}
LAYER = HyperDense(1, use_bias=False)


def response(h):
    return W_OLS * jax.nn.sigmoid(jnp.log(S**2) - h)


def ridge_train(params, h, batch, key):
    predicted = LAYER.apply(params, batch["x"], h)[:, 0]
    # The weight of an example's only feature, at its own hyper-parameter.
    weights = predicted / batch["s"]
    return jnp.mean((predicted - batch["y"]) ** 2 + jnp.exp(h[:, 0]) * weights**2)


def ridge_validation(params, h, batch):
    return jnp.mean((LAYER.apply(params, batch["x"], h)[:, 0] - 0.6 * batch["y"]) ** 2)


def ridge(outer, h):
    steps = 1500
    tune = self_tuning(
        ridge_train, ridge_validation, optax.adam(optax.cosine_decay_schedule(0.03, steps)), outer, tune_scale=False
    )
    state = tune.init(
        LAYER.init(jax.random.key(1), RIDGE["x"], jnp.zeros((5 * COPIES, 1))), hyper_parameters(jnp.array([h]), 0.3)
    )

    def one(state, n):
        key = jax.random.fold_in(KEY, n)
        tuned = is_validation_step(n, warm_up=300)
        step = lambda step: lambda state: step(state, key, RIDGE)[0]  # noqa: E731
        return jax.lax.cond(tuned, step(tune.validation_step), step(tune.train_step), state), None

    return jax.jit(lambda state: jax.lax.scan(one, state, jnp.arange(steps))[0])(state)


def best_affine(h, sigma):
    """The exact minimum over ``w = a + b eps`` of the mean of the loss over ``eps ~ N(0, sigma^2)``, a 2 x 2 system for each weight."""
    penalty = np.exp(
        h + sigma**2 / 2
    )  # the mean of exp(h + eps); times eps and eps^2: by sigma^2 and sigma^2 + sigma^4
    found = [
        np.linalg.solve(
            [[s2 + penalty, penalty * sigma**2], [penalty * sigma**2, s2 * sigma**2 + penalty * (sigma**2 + sigma**4)]],
            [s2 * w, 0],
        )
        for s2, w in zip(np.asarray(S, np.float64) ** 2, W_OLS, strict=True)
    ]
    return np.array(found).T


def test_the_network_is_the_linearised_best_response_of_ridge_regression():
    """The separating check: the slope of each weight at the trained point, within a few per cent; closer to what perturbations give."""
    h = 0.2
    state = ridge(optax.sgd(0.0), h)
    assert state.hyper.value.tolist() == [np.float32(h)]
    weights = lambda h: LAYER.apply(state.params, jnp.eye(5), jnp.broadcast_to(h, (5, 1)))[:, 0]  # noqa: E731
    value, slope = jax.jvp(weights, (jnp.float32(h),), (jnp.float32(1),))
    _, exact_slope = jax.jvp(response, (jnp.float32(h),), (jnp.float32(1),))
    np.testing.assert_allclose(slope, exact_slope, rtol=0.05)
    np.testing.assert_allclose([value, slope], best_affine(h, 0.3), rtol=0.02)
    np.testing.assert_allclose(best_affine(h, 1e-3)[1], exact_slope, rtol=1e-4)


def test_tuning_finds_the_penalty_that_is_best_for_validation():
    losses = lambda h: jnp.sum((S * (response(h) - 0.6 * W_OLS)) ** 2)  # noqa: E731
    grid = jnp.linspace(-3.0, 4.0, 1401)
    best = float(grid[jnp.argmin(jax.vmap(losses)(grid))])
    found = float(ridge(optax.adam(optax.cosine_decay_schedule(0.03, 400)), -1.0).hyper.value[0])
    assert abs(found - best) < 0.05 * abs(best + 1.0)
