"""The search for the intrinsic dimension: what it trains, what it concludes, and that it can be looked at."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.d90 import D90, d90


def searched(metric, baseline=1.0, low=10, high=10_000, **how):
    """The result, and the dimensions in the order they were run."""
    calls = []

    def run(dimension):
        assert type(dimension) is int
        calls.append(dimension)
        return metric(dimension)

    return d90(run, baseline, low, high, **how), calls


@pytest.mark.parametrize("edge", [10, 11, 57, 316, 317, 5000, 10_000])
def test_the_edge_is_found_to_the_resolution_and_the_whole_grid_is_run(edge):
    found, calls = searched(lambda d: float(d >= edge), points=4, resolution=1.05)
    assert calls[:4] == [10, 100, 1000, 10_000] and len(calls) == len(set(calls)) < 4 + 8
    assert found.dimensions == tuple(sorted(calls)) and found.metrics == tuple(float(d >= edge) for d in sorted(calls))
    assert edge <= found.dimension <= max(edge, 1.05 * edge)
    if edge in (316, 317):  # between 100 and 1000: half-way in ratio
        assert calls[4] == 316
    if edge == 10:
        assert found.below is None and found.dimension == 10 and len(calls) == 4
        assert "at most 10," in str(found)
    else:
        assert found.below < edge and (found.dimension - found.below < 2 or found.dimension <= 1.05 * found.below)
        assert f"d90 is {found.dimension:,}: " in str(found) and f"{found.below:,} was not enough" in str(found)
    assert found.exceptions == ()


def test_where_nothing_is_enough_it_says_so_and_does_not_go_on():
    found, calls = searched(lambda d: 0.5, points=3)
    assert found.dimension is None and found.below == 10_000 and calls == [10, 316, 10_000]
    assert "above 10,000" in str(found)


def test_the_threshold_is_a_share_of_the_baseline_and_not_of_what_is_above_chance():
    """0.9 of 0.8 is 0.72; from a chance of 0.5 it would be 0.77."""
    metric = lambda d: d / 10_000  # noqa: E731
    found, _ = searched(metric, baseline=0.8, resolution=1.0005)
    assert found.threshold == pytest.approx(0.72) and abs(found.dimension - 7200) <= 4
    found, _ = searched(metric, baseline=0.8, resolution=1.0005, chance=0.5)
    assert found.threshold == pytest.approx(0.77) and abs(found.dimension - 7700) <= 4
    found, _ = searched(metric, baseline=0.8, resolution=1.0005, share=0.5)
    assert abs(found.dimension - 4000) <= 3 and "d50 is" in str(found)
    reward, _ = searched(lambda d: -100 + d / 100, baseline=-10.0, chance=-100.0, resolution=1.0005)
    assert reward.threshold == pytest.approx(-19) and abs(reward.dimension - 8100) <= 5


def test_reaching_it_exactly_is_reaching_it():
    assert searched(lambda d: 0.9, baseline=1.0)[0].dimension == 10


def test_a_diverged_run_has_not_reached_it():
    found, _ = searched(lambda d: math.nan if d < 1000 else math.inf if d == 1000 else 1.0, points=4, resolution=2.0)
    assert 1000 < found.dimension <= 2000 and found.reached[0] is False
    assert "nan" in str(found)


def test_noise_above_the_result_is_named():
    found, _ = searched(lambda d: float(d >= 50 and d != 1000), points=4, resolution=1.1)
    assert found.exceptions == (1000,) and 50 <= found.dimension <= 55
    assert "1,000 did not reach it." in str(found)


def test_the_table_has_a_row_for_each_dimension():
    found = D90((10, 2000), (0.5, 0.7625), 0.8, chance=0.3)
    rows = [line.split() for line in str(found).splitlines()]
    assert ["10", "0.5000", "40.0%", "no"] in rows and ["2,000", "0.7625", "92.5%", "yes"] in rows
    assert ["full", "0.8000", "100.0%"] in rows


def test_the_picture_shows_curve_baseline_and_result(tmp_path):
    from matplotlib.image import imread

    found = D90((10, 100, 1000), (0.2, 0.9, 1.0), 1.0)
    image = imread(found.plot(tmp_path / "curve.png", "a task"))[..., :3]
    near = lambda colour: np.abs(image - np.array(colour) / 255).max(-1) < 0.05  # noqa: E731
    assert near((31, 119, 180)).sum() > 500  # the curve
    red = near((214, 39, 40))
    assert red.sum(0).max() > 0.6 * len(image)  # the result: a line from bottom to top, in the middle of the grid
    assert 0.35 < np.argmax(red.sum(0)) / image.shape[1] < 0.65
    nothing = D90((10, 100), (0.2, math.nan), 1.0).plot(tmp_path / "none.png")
    assert not (np.abs(imread(nothing)[..., :3] - np.array((214, 39, 40)) / 255).max(-1) < 0.05).any()


def test_the_papers_toy_takes_its_ten_dimensions():
    """Ten sums of a hundred numbers each, trained in the subspace of the method; the loss is turned into a metric of full training's."""
    params = {"layer": {"kernel": jnp.zeros((10, 100))}}
    wanted = np.arange(1.0, 11)

    def run(dimension):
        plan = lr.plan(params, {".*": lr.intrinsic(dimension, projection="sparse", seed=1)})
        train, frozen = lr.partition(lr.init(jax.random.key(0), params, plan))
        (path,) = train

        def sums(theta):  # linear in theta, so that least squares train it
            forms = lr.expand(lr.join({path: {"theta": theta}}, frozen))
            return forms["layer/kernel"].change.sum(-1)

        columns = np.asarray(jax.jit(jax.vmap(sums, out_axes=1))(jnp.eye(dimension)), np.float64)
        theta = np.linalg.lstsq(columns, wanted)[0]
        return -float(np.log10(np.mean((columns @ theta - wanted) ** 2) / np.mean(wanted**2) + 1e-12))

    found = d90(run, baseline=12.0, low=8, high=13, points=2, resolution=1.01)
    assert found.dimension == 10 and found.below == 9


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"baseline": 0.0}, r"baseline=0.0\): expected a number above chance=0.0"),
        ({"baseline": 0.5, "chance": 0.6}, "baseline=0.5"),
        ({"baseline": math.nan}, "baseline=nan"),
        ({"share": 0.0}, r"share=0.0\): expected a share"),
        ({"share": 1.5}, "share=1.5"),
        ({"low": 0}, "low=0, high=10000"),
        ({"low": 10_000}, "low=10000, high=10000"),
        ({"high": 2e4}, "high=20000.0"),
        ({"points": 1}, r"points=1\): expected at least 2"),
        ({"resolution": 1.0}, r"resolution=1.0\): expected a ratio above 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(how, message):
    def run(dimension):
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=message):
        d90(run, **{"baseline": 1.0, "low": 10, "high": 10_000, **how})


@pytest.mark.parametrize("value", [None, "much", (0.1, 0.2)])
def test_a_metric_that_is_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"run\(10\) returned .*: expected one number"):
        searched(lambda d: value)
