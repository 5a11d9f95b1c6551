"""AdaPT: the divergence, push-down, push-up, and the controller that switches the precision of each layer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kernel

from lowrank_jax.fixed_point import fixed_point
from lowrank_jax.optim.precision import adaptive_precision
from lowrank_jax.optim.precision_state import mean_word_length, quantise_params, sparsity_penalty
from lowrank_jax.optim.precision_switch import (
    MAX,
    MEAN,
    MIN,
    gradient_diversity,
    histogram_divergence,
    push_down,
    push_up,
)

KEY = jax.random.key(0)
NORMAL = 0.05 * kernel(20_000)


def divergence(w, word, fraction, bins=100):
    return float(divergence_of(w, jnp.int32(word), jnp.int32(fraction), bins))


@jax.jit
def between(x, y, bins):
    return histogram_divergence(x, y, bins, max_bins=150)


@jax.jit
def divergence_of(w, word, fraction, bins):
    return histogram_divergence(w, fixed_point(w, word, fraction, KEY), bins, max_bins=150)


# The divergence.


def test_divergences_of_a_normal_layer():
    """A step below the width of a bin loses nothing, a wider one empties bins, and clipping at 2.5 deviations shows at any step."""
    assert divergence(NORMAL, 8, 8) < 0.05
    assert divergence(NORMAL, 6, 7) == pytest.approx(12.0, abs=1.0)
    assert divergence(NORMAL, 8, 10) == pytest.approx(0.25, abs=0.05)
    assert divergence(NORMAL, 12, 14) == pytest.approx(0.25, abs=0.05)
    assert divergence(NORMAL, 9, 10) < divergence(
        NORMAL, 8, 8
    )  # the fractions of the third line, and the integer bits of the first


def test_both_histograms_have_the_edges_of_the_first():
    """The separating check: with edges of its own, a tensor and its double have the same histogram."""
    assert float(between(NORMAL, 2 * NORMAL, 100)) > 0.2
    assert float(between(NORMAL, NORMAL, 100)) == 0
    w, q = NORMAL, 1.3 * NORMAL + 0.01
    edges = np.linspace(float(w.min()), float(w.max()), 31)
    p, r = (np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] / w.size for x in (np.asarray(w), np.asarray(q)))
    expected = sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, r, strict=True) if a)
    assert float(between(w, q, 30)) == pytest.approx(expected, rel=0.02)


def test_the_number_of_bins_is_traced():
    traced = [float(between(NORMAL, 1.1 * NORMAL, bins)) for bins in (50, 100, 150)]
    assert traced[1] == pytest.approx(float(histogram_divergence(NORMAL, 1.1 * NORMAL, 100)), rel=1e-4)
    assert len(set(traced)) == 3


def test_a_constant_layer():
    zeros = jnp.zeros(50)
    assert float(histogram_divergence(zeros, zeros, 100)) == 0
    assert float(histogram_divergence(zeros + 1, zeros + 1.001, 100)) == 0


# Push-down.


@jax.jit
def found(w, threshold, bins=100):
    return push_down(w, KEY, threshold, bins, max_bins=100, max_fraction=28)


LAYERS = {
    "normal": 0.05 * kernel(1200),
    "large": 7.0 * kernel(1200, seed=1),
    "tiny": 1e-3 * kernel(1200, seed=2),
    "uniform": jnp.linspace(-0.3, 0.3, 1200),
    "outlier": (0.02 * kernel(1200, seed=3)).at[5].set(1.0),
    "one_sided": jnp.abs(kernel(1200, seed=4)),
}


def test_push_down_finds_the_shortest_word_of_all_formats():
    words, fractions = (jnp.array(x) for x in zip(*itertools.product(range(2, 15), range(21)), strict=True))

    @jax.jit
    def every(w):
        one = lambda f: histogram_divergence(w, fixed_point(w, *f, KEY), 100)  # noqa: E731
        return jax.lax.map(one, (words, fractions))

    lost = {name: np.asarray(every(w)) for name, w in LAYERS.items()}
    for (name, w), threshold in itertools.product(LAYERS.items(), (0.05, 0.5)):
        word, fraction = (int(x) for x in found(w, threshold))
        kept = lost[name] < threshold
        assert kept.any(), name
        assert divergence(w, word, fraction) < threshold, name
        assert word == int(words[kept].min()), name


def test_push_down_gives_up_integer_bits():
    """One outlier is clipped rather than every word made longer: at fixed integer bits that cover it the word is longer."""
    w = LAYERS["outlier"]
    word, fraction = (int(x) for x in found(w, 0.05))
    assert 2.0 ** (word - 1 - fraction) < 1.0
    covering = next(n for n in range(2, 32) if divergence(w, n, n - 2) < 0.05)
    assert word < covering


def test_push_down_where_nothing_is_good_enough_keeps_most():
    word, fraction = found(LAYERS["normal"], 0.0)
    assert int(fraction) == 28 and int(word) == 28 - 1  # |w| < 0.25


# Push-up.


def test_gradient_diversity():
    same = jnp.broadcast_to(kernel(6), (4, 6))
    orthogonal = jnp.eye(4, 6)

    def of(gradients):
        norms = jnp.linalg.norm(gradients, axis=1).sum()
        return float(gradient_diversity(norms, jnp.linalg.norm(gradients.sum(0))))

    assert of(same) == pytest.approx(1.0)
    assert of(orthogonal) == pytest.approx(2.0)
    assert of(jnp.array([[1.0, 0], [-1.0, 0]])) == np.inf
    assert of(jnp.zeros((3, 2))) == 1.0


def test_push_up_never_falls_below_push_down():
    integers, fractions, buffers = range(-6, 12), range(0, 25), (4, 8)
    diversities = (1.0, 2.0, 2.8, 3.5, 5.0, 20.0, 1e6, np.inf)
    grid = [
        (i + f, f, b, d)
        for i, f, b, d in itertools.product(integers, fractions, buffers, diversities)
        if 2 <= i + f <= 32 and f <= 32 - b
    ]
    word, fraction, buffer, diversity = (jnp.array(x) for x in zip(*grid, strict=True))
    up = jax.jit(lambda strategy: push_up(word, fraction, diversity, strategy, buffer))
    results = [[np.asarray(x) for x in up(jnp.int32(strategy))] for strategy in (MIN, MEAN, MAX)]
    for new_word, new_fraction in results:
        assert (new_word >= word).all() and (new_fraction >= fraction).all()
        assert (new_word <= 32).all()
        assert (new_word - new_fraction >= word - fraction).all()  # nothing that was in range is clipped
        room = np.asarray(fraction < 32 - jnp.maximum(buffer, word - fraction))
        assert (new_fraction > fraction)[room].all()
    assert (results[0][1] <= results[1][1]).all() and (results[1][1] <= results[2][1]).all()
    assert (results[0][1] < results[2][1]).any()


def test_push_up_at_one_point():
    """``log(7.389) - 1 = 1``: one bit, or what is left up to 32; ``log(4.482) - 1 = 0.5``: four bits, or 8 - 6."""
    for diversity, strategy, expected in [
        (np.e**2, MIN, 7), (np.e**1.501, MIN, 6 + 3), (np.e**1.501, MEAN, 6 + 4), (np.e**1.501, MAX, 6 + 4), (np.e**2, MAX, 28),
        (1.0, MAX, 7),
    ]:  # fmt: skip
        word, fraction = push_up(jnp.int32(8), jnp.int32(6), jnp.float32(diversity * 1.0001), jnp.int32(strategy), 4)
        assert (int(word), int(fraction)) == (expected + 4, expected), (diversity, strategy)


# The controller.

SMALL = {"min_look_back": 3, "max_look_back": 6, "min_resolution": 20, "max_resolution": 40}


TRACES = []


@jax.jit
def small_step(g, state, params, value):
    TRACES.append(1)
    return adaptive_precision(**SMALL).update(g, state, params, value=value)


def drive(params, gradients, losses):
    """The states after each step, and the last updates; one program for all steps."""
    states, state, before = [], adaptive_precision(**SMALL).init(params), len(TRACES)
    for g, value in zip(gradients, losses, strict=True):
        updates, state = small_step(g, state, params, jnp.float32(value))
        states.append(state)
    assert len(TRACES) <= before + 1
    return states, updates


def layer(w=None, **others):
    return {"layer": {"kernel": 0.05 * kernel(30, 40) if w is None else w, "bias": jnp.ones(40)}, **others}


def same_gradients(params, steps):
    return [jax.tree.map(jnp.ones_like, params)] * steps


def test_a_switch_comes_after_each_window_and_not_before():
    params = layer()
    states, updates = drive(params, same_gradients(params, 13), range(13, 0, -1))
    formats = [
        (int(s.layers["layer/kernel"].word_length.item()), int(s.layers["layer/kernel"].seen.item())) for s in states
    ]
    assert [seen for _, seen in formats] == [
        1,
        2,
        3,
        4,
        5,
        0,
        1,
        2,
        3,
        4,
        5,
        0,
        1,
    ]  # the same gradients: the longest window
    words = [word for word, _ in formats]
    assert words[:5] == [8] * 5 and words[5] != 8 and len(set(words[5:11])) == 1
    here = states[5].layers["layer/kernel"]
    low, _ = found(params["layer"]["kernel"].ravel(), 0.05, int(here.resolution.item()))
    assert here.word_length.item() > int(low)
    assert here.gradient.shape == (30, 40) and not here.gradient.any() and not here.norms.any()
    np.testing.assert_allclose(np.linalg.norm(updates["layer"]["kernel"]), 1, rtol=1e-5)
    assert (updates["layer"]["bias"] == 1).all()


def test_diverse_gradients_shorten_the_window_and_coarsen_the_histogram():
    params = layer()
    signs = [1.0, -1.0] * 10
    opposed = [jax.tree.map(lambda x, s=s: s * jnp.ones_like(x), params) for s in signs]
    states, _ = drive(params, opposed, range(20, 0, -1))
    equal, _ = drive(params, same_gradients(params, 20), range(20, 0, -1))
    shorter, longer = ([s.layers["layer/kernel"] for s in run] for run in (states, equal))
    assert [x.look_back.item() for x in longer] == [6.0] * 20
    assert 3 <= shorter[-1].look_back.item() < 4.5
    switches = [sum(x.seen.item() == 0 for x in run) for run in (shorter, longer)]
    assert switches[0] > switches[1] == 3
    assert shorter[-1].resolution.item() < longer[-1].resolution.item() <= 40


def strategies(losses):
    params = layer()
    states, _ = drive(params, same_gradients(params, len(losses)), losses)
    return [int(s.strategy) for s in states]


def test_a_loss_that_stalls_escalates_and_one_that_falls_resets():
    # The mean of the six losses before the seventh is the first that a loss is held against.
    assert strategies([1.0] * 9 + [0.5, 2.0]) == [MIN] * 6 + [MEAN, MAX, MAX, MIN, MEAN]
    assert strategies(list(range(20, 8, -1))) == [MIN] * 12
    # What is older than the window is forgotten.
    assert strategies([100.0] * 6 + [1.0] * 6 + [1.0])[-2:] == [MIN, MEAN]


def test_losses_before_the_window_are_forgotten():
    """The ring has room for six losses; with windows of three the last three count."""
    params = layer()
    state = adaptive_precision(**SMALL).init(params)
    here = state.layers["layer/kernel"]
    layers = {"layer/kernel": here._replace(look_back=jnp.full_like(here.look_back, 3.0))}
    # After eight steps the last three were written at places 5, 0 and 1.
    losses = jnp.array([1.0, 1.0, 100.0, 100.0, 100.0, 1.0])
    state = state._replace(count=jnp.int32(8), layers=layers, losses=losses)
    gradients = jax.tree.map(jnp.ones_like, params)
    after = [small_step(gradients, state, params, jnp.float32(value))[1] for value in (2.0, 0.5)]
    assert [int(s.strategy) for s in after] == [MEAN, MIN]
    assert after[0].losses.tolist() == [1.0, 1.0, 2.0, 100.0, 100.0, 1.0]


def test_layers_of_a_stack_have_formats_of_their_own():
    scales = jnp.array([1e-3, 1.0, 60.0]).reshape(3, 1, 1)
    params = {"layers": {"kernel": scales * kernel(3, 30, 40), "bias": jnp.zeros((3, 40))}}
    states, updates = drive(params, same_gradients(params, 6), range(6, 0, -1))
    here = states[-1].layers["layers/kernel"]
    assert here.word_length.shape == here.fraction_length.shape == here.norms.shape == (3, 1, 1)
    fractions, integers = here.fraction_length.ravel(), (here.word_length - here.fraction_length).ravel()
    assert fractions[0] > fractions[1] > fractions[2] and integers[2] > integers[0]
    q = quantise_params(params, states[-1], KEY)["layers"]["kernel"]
    for n in range(3):
        k = np.asarray(q[n], np.float64) * 2.0 ** int(fractions[n])
        assert (k == np.round(k)).all() and len(np.unique(k)) > 10
        w = params["layers"]["kernel"][n].ravel()
        assert divergence(w, int(here.word_length[n].item()), int(fractions[n]), 30) < 0.05
    np.testing.assert_allclose(np.linalg.norm(updates["layers"]["kernel"], axis=(1, 2)), 1, rtol=1e-5)


def test_quantised_training_learns_with_few_bits():
    """Trained through the rounding, least squares get near the targets, on weights that are all on their grids."""
    truth, x = 0.3 * kernel(30, 40, seed=5), kernel(128, 30, seed=6)
    params = start = layer(jnp.zeros((30, 40)))
    params["layer"]["bias"] = jnp.zeros(40)

    def loss(params):
        return jnp.mean((x @ params["layer"]["kernel"] + params["layer"]["bias"] - x @ truth) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(lambda p, state, key: loss(quantise_params(p, state, key))))
    state = adaptive_precision(**SMALL).init(params)
    for n in range(150):
        value, grads = value_and_grad(params, state, jax.random.fold_in(KEY, n))
        updates, state = small_step(grads, state, params, value)
        params = jax.tree.map(lambda p, u, n=n: p - 0.3 * (1 - n / 150) * u, params, updates)
    quantised = quantise_params(params, state, KEY)
    assert loss(quantised) < 0.01 * loss(start)
    here = state.layers["layer/kernel"]
    k = np.asarray(quantised["layer"]["kernel"], np.float64) * 2.0 ** int(here.fraction_length.item())
    assert (k == np.round(k)).all() and here.word_length.item() < 24
    assert (quantised["layer"]["bias"] == params["layer"]["bias"]).all()


def test_bfloat16_parameters():
    params = layer((0.05 * kernel(30, 40)).astype(jnp.bfloat16))
    states, updates = drive(params, same_gradients(params, 7), range(7, 0, -1))
    assert updates["layer"]["kernel"].dtype == jnp.bfloat16
    here = states[-1].layers["layer/kernel"]
    assert here.gradient.dtype == jnp.float32 and here.fraction_length.item() != 4
    q = quantise_params(params, states[-1], KEY)["layer"]["kernel"]
    k = np.asarray(q, np.float64) * 2.0 ** int(here.fraction_length.item())
    assert q.dtype == jnp.bfloat16 and (k == np.round(k)).all()


def test_size_and_penalty():
    params = {
        "a": {"kernel": jnp.array([[1.0, 0.0], [-2.0, 0.0]])},
        "b": {"kernel": jnp.ones((1, 4))},
        "c": jnp.ones(5),
    }
    state = adaptive_precision(start=(8, 4)).init(params)
    state.layers["b/kernel"] = state.layers["b/kernel"]._replace(word_length=jnp.full((1, 1), 16))
    assert float(mean_word_length(params, state)) == pytest.approx((2 * 8 + 4 * 16) / 8)
    penalty = lambda p: sparsity_penalty(p, state, l1=0.5, words=2.0)  # noqa: E731
    expected = 0.5 * (3 + 4) + 2.0 * (8 / 32 * 0.5 + 16 / 32 * 1.0)
    assert float(penalty(params)) == pytest.approx(expected)
    assert jax.grad(penalty)(params)["a"]["kernel"].tolist() == [[0.5, 0.0], [-0.5, 0.0]]


def test_bad_arguments_are_refused():
    params = layer()
    for bad, message in [
        ({"threshold": 0.0}, "threshold=0.0.*above 0"),
        ({"min_look_back": 9, "max_look_back": 3}, "min_look_back=9, max_look_back=3"),
        ({"min_resolution": 1}, "min_resolution=1"),
        ({"buffer": 40}, "buffer=40"),
        ({"start": (40, 4)}, r"start=\(40, 4\)"),
        ({"look_back_momentum": 0.0}, "look_back_momentum=0.0"),
    ]:
        with pytest.raises(ValueError, match=f"adaptive_precision.*{message}"):
            adaptive_precision(**bad)
    precision = adaptive_precision()
    with pytest.raises(ValueError, match="adaptive_precision.*'nothing'.*matches no weight"):
        adaptive_precision(targets=["nothing"]).init(params)
    state = precision.init(params)
    with pytest.raises(ValueError, match="adaptive_precision: update needs value="):
        precision.update(params, state, params)
    with pytest.raises(ValueError, match="adaptive_precision: update needs the parameters"):
        precision.update(params, state, value=jnp.float32(1))
    other = {"other": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="adaptive_precision: the state holds .*layer/kernel.*other/kernel.*init"):
        precision.update(other, state, other, value=jnp.float32(1))
    with pytest.raises(ValueError, match="quantise_params: the state holds layer/kernel.*not in the parameters"):
        quantise_params(other, state, KEY)
