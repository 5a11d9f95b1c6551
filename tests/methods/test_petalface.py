"""PETALface: what each image's quality does to its own rows, windows, dropout, and one quality for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call, QualityPair, UnsupportedError

N_IN, N_OUT, RANK = 12, 10, 3
K, X = kernel(N_IN, N_OUT), kernel(4, 5, N_IN, seed=1)


def petalface(**fields):
    return lr.petalface(**{"rank": RANK, "alpha": 2.0 * RANK, "threshold": 0.4, **fields})


def moved(method=None, weight=K):
    adapters = adapt(weight, petalface() if method is None else method)
    leaves = {n: kernel(*x.shape, seed=5) for n, x in adapters.sites[PATH].items()}
    return adapters.replace(sites={PATH: leaves})


def output(adapters, quality, x=X, rng=None):
    signals = {} if quality is None else {"quality": jnp.asarray(quality)}
    return lr.expand(adapters)[PATH].apply(Call("dense", x, x @ K, K, jnp.matmul, rng, None, signals))


def loras(adapters):
    a, b = (np.asarray(adapters.sites[PATH][n], np.float64) for n in ("a", "b"))
    return a[:, :RANK] @ b[:RANK], a[:, RANK:] @ b[RANK:]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_each_image_mixes_by_its_own_quality():
    adapters = moved()
    first, second = loras(adapters)
    # w = 0.5 + (q - 0.4), clipped: only the first, only the second, half of each, in between.
    for quality, w in ((-0.1, 0.0), (0.9, 1.0), (0.4, 0.5), (0.2, 0.3), (-5.0, 0.0), (7.0, 1.0)):
        expected = np.asarray(X) @ (np.asarray(K) + 2 * ((1 - w) * first + w * second))
        close(output(adapters, [quality] * 4), expected)
    mixed = output(adapters, [-0.1, 0.9, 0.4, 0.2])
    for n, quality in enumerate((-0.1, 0.9, 0.4, 0.2)):
        close(mixed[n], output(adapters, [quality] * 4)[n])


def test_the_output_is_affine_in_the_weight():
    y = [output(moved(), [0.4 + w - 0.5] * 4) for w in (0.0, 0.25, 1.0)]
    close(y[1], 0.75 * y[0] + 0.25 * y[2])


def test_another_images_quality_changes_nothing():
    one, two = (output(moved(), [0.3, quality, 0.5, 0.6]) for quality in (0.1, 0.8))
    assert (one[jnp.array([0, 2, 3])] == two[jnp.array([0, 2, 3])]).all() and (one[1] != two[1]).any()


def test_windows_of_an_image_follow_one_another():
    adapters, quality = moved(), [0.1, 0.8]
    windows = output(adapters, quality)  # two windows for each of two images
    close(windows, output(adapters, [0.1, 0.1, 0.8, 0.8]))
    assert np.abs(windows - output(adapters, [0.1, 0.8, 0.1, 0.8])).max() > 1e-2


def test_the_release_does_not_clip():
    adapters = moved(petalface(compat="official"))
    first, second = loras(adapters)
    close(output(adapters, [1.4] * 4), np.asarray(X) @ (np.asarray(K) + 2 * (-0.5 * first + 1.5 * second)))


def test_dropout_is_on_the_output_of_each_lora():
    adapters = moved(petalface(dropout=0.25))
    base, x = X @ K, X
    first, second = (2 * w * (np.asarray(x) @ part) for w, part in zip((0.7, 0.3), loras(adapters), strict=True))
    dropped = np.asarray(output(adapters, [0.2] * 4, rng=jax.random.key(0)) - base)
    choices = np.stack([i * first / 0.75 + j * second / 0.75 for i in (0, 1) for j in (0, 1)])
    which = np.abs(dropped - choices).argmin(0)
    assert np.abs(dropped - choices).min(0).max() < 1e-4
    # Kept and dropped independently: 200 elements, so the standard error of each share is at most 0.035.
    shares = np.bincount(which.ravel(), minlength=4) / which.size
    np.testing.assert_allclose(shares, [1 / 16, 3 / 16, 3 / 16, 9 / 16], atol=0.14)
    assert (output(adapters, [0.2] * 4) == output(moved(), [0.2] * 4)).all()


def test_at_one_quality_it_merges():
    adapters = moved(petalface(dropout=0.25))
    with pytest.raises(UnsupportedError, match="cannot be merged.*at_quality"):
        lr.merge(params_of(K), adapters)
    fixed = lr.at_quality(adapters, 0.2)
    assert fixed.sites[PATH]["a"] is adapters.sites[PATH]["a"]
    merged = lr.merge(params_of(K), fixed)["layer"]["kernel"]
    expected = output(adapters, [0.2] * 4)
    close(X @ merged, expected)
    close(output(fixed, None), expected)
    close(output(lr.at_quality(fixed, None), [0.2] * 4), expected)


def test_a_stack_at_one_quality():
    weight = kernel(3, N_IN, N_OUT)
    adapters = lr.at_quality(moved(lr.on_layers(petalface(), [0, 2]), weight), 0.9)
    a, b = (np.asarray(adapters.sites[PATH][n], np.float64) for n in ("a", "b"))
    change = np.asarray(delta(adapters, weight))
    close(change[[0, 2]], 2 * a[..., RANK:] @ b[..., RANK:, :])
    assert not change[1].any()


def test_it_starts_normal_and_at_zero():
    p = adapt(kernel(400, 300), petalface()).sites[PATH]
    # 2400 draws: the standard error of the standard deviation is 1.4%.
    assert abs(float(p["a"].std()) * RANK - 1) < 0.07 and not p["b"].any()


def test_no_quality_is_an_error():
    with pytest.raises(ValueError, match="petalface weighs each row by its image's quality: pass signals"):
        output(moved(), None)
    with pytest.raises(ValueError, match="4 rows at this site are not a multiple of the 3 qualities"):
        output(moved(), [0.1, 0.2, 0.3])
    form = QualityPair(kernel(2, N_IN, 2), kernel(2, 2, N_OUT))
    call = Call("dense", X[:2], X[:2] @ K, jnp.stack([K, K]), jnp.matmul, signals={"quality": jnp.ones(2)})
    with pytest.raises(UnsupportedError, match="experts"):
        form.apply(call)
    with pytest.raises(ValueError, match="at_quality: the plan has no site of petalface \\(it has lora\\)"):
        lr.at_quality(adapt(K, lr.lora(2)), 0.5)


@pytest.mark.parametrize("fields", [{"compat": "code"}, {"dropout": 1.0}, {"dropout": 0.1, "quality": 0.5}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"petalface\\({next(iter(fields))}="):
        petalface(**fields)
