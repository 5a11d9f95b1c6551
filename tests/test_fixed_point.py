"""Fixed point: on the grid, in range, unbiased, and no new program for a new format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kernel

from lowrank_jax.fixed_point import fixed_point

KEY = jax.random.key(0)
FORMATS = [(1, 0), (4, 2), (8, 4), (8, 8), (6, 9), (16, 12), (24, 24), (32, 28), (32, 32)]


def on_grid(q, word, fraction):
    """The integers that the numbers stand for; exact in float64."""
    k = np.asarray(q, np.float64) * 2.0**fraction
    assert (k == np.round(k)).all()
    assert k.min() >= -(2.0 ** (word - 1)) and k.max() <= 2.0 ** (word - 1) - 1
    return k


def test_rounding_is_unbiased_and_to_nearest_is_not():
    """The separating check: the mean error of deterministic rounding is far outside four standard errors."""
    n, step = 20_000, 2.0**-6
    random = np.random.default_rng(1)
    inside = {"one place of a cell": np.full(n, 5.3 * step), "anywhere": random.uniform(-0.4, 0.4, n)}
    for name, x in inside.items():
        x = jnp.asarray(x, jnp.float32)
        fraction = np.mod(np.asarray(x, np.float64) / step, 1)
        standard_error = step * np.sqrt(np.mean(fraction * (1 - fraction)) / n)
        error = np.asarray(fixed_point(x, 8, 6, KEY), np.float64) - np.asarray(x, np.float64)
        assert abs(error.mean()) < 4 * standard_error, name
        assert 0.5 < error.std() / (standard_error * np.sqrt(n)) < 1.5
    nearest = np.asarray(fixed_point(inside["one place of a cell"], 8, 6, None), np.float64) - 5.3 * step
    assert abs(nearest.mean()) > 50 * standard_error


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("word", "fraction"), FORMATS)
def test_values_are_on_the_grid_in_range_and_stay_there(word, fraction, dtype):
    scale = 2.0 ** (word - 1 - fraction)
    x = (kernel(40, 50) * scale).astype(dtype)
    q = fixed_point(x, word, fraction, KEY)
    assert q.dtype == dtype
    k = on_grid(q, word, fraction)
    # Far from the ends, no further from where it was than a step.
    far = np.abs(np.asarray(x, np.float64)) < scale / 2
    assert (np.abs(k - np.asarray(x, np.float64) * 2.0**fraction)[far] < 1).all()
    assert (fixed_point(q, word, fraction, jax.random.key(9)) == q).all()
    assert (np.asarray(k)[np.asarray(x, np.float64) < -scale] == -(2.0 ** (word - 1))).all()


def test_large_numbers_and_not_a_number():
    x = jnp.array([1e38, -1e38, jnp.inf, -jnp.inf, jnp.nan, 0.0])
    got = np.asarray(fixed_point(x, 32, 32, KEY))
    assert got[:2].tolist() == got[2:4].tolist() == [0.5 - 2.0**-25, -0.5]
    assert np.isnan(got[4]) and got[5] == 0


def test_formats_are_traced():
    traces = []

    @jax.jit
    def quantised(x, word, fraction):
        traces.append(1)
        return fixed_point(x, word, fraction, KEY)

    x = kernel(20, 30)
    for word, fraction in FORMATS:
        got = quantised(x, jnp.int32(word), jnp.int32(fraction))
        assert (got == fixed_point(x, word, fraction, KEY)).all()
        on_grid(got, word, fraction)
    assert len(traces) == 1


def test_each_layer_has_its_format():
    x = kernel(3, 20, 30)
    formats = [(4, 2), (8, 6), (12, 9)]
    word, fraction = (jnp.asarray(f).reshape(3, 1, 1) for f in zip(*formats, strict=True))
    got = fixed_point(x, word, fraction, KEY)
    nearest = fixed_point(x, word, fraction, None)
    for n, (w, f) in enumerate(formats):
        on_grid(got[n], w, f)
        assert (nearest[n] == fixed_point(x[n], w, f, None)).all()
    assert len(np.unique(got[2])) > 4 * len(np.unique(got[0]))


def test_the_gradient_passes_straight_through():
    x = jnp.array([0.3, -0.7, 5.0, -5.0])  # the last two are clipped
    weights = jnp.array([1.0, 2.0, 3.0, 4.0])
    got = jax.jit(jax.grad(lambda x: jnp.vdot(fixed_point(x, jnp.int32(4), jnp.int32(3), KEY), weights)))(x)
    assert got.tolist() == weights.tolist()
    assert jax.jvp(lambda x: fixed_point(x, 4, 3, KEY), (x,), (weights,))[1].tolist() == weights.tolist()
    narrow = jax.grad(lambda x: fixed_point(x, 4, 3, KEY).astype(jnp.float32).sum())(x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and (narrow == 1).all()


def test_bad_formats_are_refused():
    with pytest.raises(ValueError, match=r"fixed_point\(word_length=33.*1 to 32"):
        fixed_point(jnp.ones(3), 33, 4, KEY)
    with pytest.raises(ValueError, match=r"fixed_point\(fraction_length=-1.*0 to 32"):
        fixed_point(jnp.ones(3), 8, -1, KEY)
    with pytest.raises(ValueError, match="int32.*floating"):
        fixed_point(jnp.ones(3, jnp.int32), 8, 4, KEY)
    with pytest.raises(ValueError, match=r"word_length.*\[2\].*\[3\]"):
        fixed_point(jnp.ones(3), jnp.array([8, 8]), 4, KEY)
