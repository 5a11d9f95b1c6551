"""Intrinsic dimension: one trained vector for all weights, spread by random projections; and a learned scale at each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance_rows.intrinsic import numpy_projection
from one_layer import PATH, adapt, kernel, leaves_of, params_of, training
from scipy.optimize import minimize

import lowrank_jax as lr

SHAPES = {"q": (12, 10), "up": (12, 30)}
PARAMS = {name: {"kernel": kernel(*shape)} for name, shape in SHAPES.items()}
SIZE = sum(n * m for n, m in SHAPES.values())


def intrinsic(dimension=25, params=PARAMS, key=0, **fields):
    plan = lr.plan(params, {".*": lr.intrinsic(dimension, **fields)})
    return lr.init(jax.random.key(key), params, plan)


def moved(adapters, scales=(0.5, -2.0)):
    """Theta and the scales of the sites, far from their start."""
    (name,) = adapters.shared
    theta = adapters.shared[name]["theta"]
    theta = jnp.asarray(np.random.default_rng(0).standard_normal(theta.shape), jnp.float32)
    sites = {
        path: {**leaves, "scale": jnp.full_like(leaves["scale"], scale)}
        for (path, leaves), scale in zip(sorted(adapters.sites.items()), scales, strict=True)
    }
    return adapters.replace(sites=sites, shared={name: {**adapters.shared[name], "theta": theta}})


@jax.jit
def deltas(adapters):
    return {path: form.delta(jnp.zeros(())) for path, form in lr.expand(adapters).items()}


def theta_of(adapters):
    (shared,) = adapters.shared.values()
    return np.asarray(shared["theta"], np.float64)


def test_said_trains_exactly_d_numbers_its_scales_among_them():
    """And each weight moves by about ``|scale| |theta|``, as the released code has it."""
    for per_site_scale, length in ((True, 23), (False, 25)):
        adapters = intrinsic(per_site_scale=per_site_scale, normalise="site")
        train, _ = lr.partition(adapters)
        assert sum(x.size for x in jax.tree.leaves(train)) == adapters.plan.trainable == 25
        assert theta_of(adapters).shape == (length,)
        assert lr.count(adapters).trainable == 25
    stack = lr.plan(params_of(kernel(4, 8, 6)), {"layer/kernel": lr.intrinsic(25, per_site_scale=True)})
    assert stack.trainable == 25  # one scale for each layer of a stack: theta has 21
    adapters = moved(intrinsic(per_site_scale=True, normalise="site"))
    length = np.linalg.norm(theta_of(adapters))
    for path, delta in deltas(adapters).items():
        expected = abs(float(adapters.sites[path]["scale"][0])) * length
        assert np.linalg.norm(delta) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("projection", ["fastfood", "dense", "sparse"])
def test_the_whole_offset_is_as_long_as_theta(projection):
    """P as a whole has columns of length 1, however many weights it is laid over; and P theta is what the weights get."""
    adapters = moved(intrinsic(projection=projection), scales=(1, 1))
    theta = theta_of(adapters)
    columns = []
    for path, delta in deltas(adapters).items():
        seed, share = np.asarray(adapters.sites[path]["seed"]), (delta.size / SIZE) ** 0.5
        p = share * numpy_projection(projection, seed, delta.size, 25)
        np.testing.assert_allclose(delta.ravel(), p @ theta, rtol=0, atol=1e-5)
        columns.append(p)
    gram = np.concatenate(columns).T @ np.concatenate(columns)
    # Fastfood's columns have length 1 in expectation only: at these 600 numbers the squares spread by about 0.07, three of which are 0.2.
    np.testing.assert_allclose(np.diag(gram), 1, atol=0.2 if projection == "fastfood" else 1e-9)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 6 / SIZE**0.5
    whole = np.sqrt(sum(np.sum(np.square(x)) for x in deltas(adapters).values()))
    assert whole == pytest.approx(np.linalg.norm(theta), rel=0.2)


def test_sites_and_seeds_have_subspaces_of_their_own():
    params = {"one": {"kernel": kernel(16, 16)}, "two": {"kernel": kernel(16, 16)}}

    def updates(**fields):
        adapters = intrinsic(20, params, projection="sparse", **fields)
        return [np.ravel(x) for x in deltas(moved(adapters, (1, 1))).values()]

    found = [x for fields in ({}, {"seed": 1}, {"key": 1}) for x in updates(**fields)]
    assert len(found) == 6 and np.abs(np.corrcoef(found) - np.eye(6)).max() < 0.25
    np.testing.assert_array_equal(updates(seed=1), found[2:4])


@pytest.mark.parametrize("normalise", ["model", "site"])
def test_with_scales_of_one_it_is_the_method_without(normalise):
    said = moved(intrinsic(25, per_site_scale=True, normalise=normalise), scales=(1, 1))
    did = moved(intrinsic(23, normalise=normalise), scales=(1, 1))
    jax.tree.map(np.testing.assert_array_equal, deltas(said), deltas(did))


def test_theta_and_scales_may_swap_a_factor():
    adapters = moved(intrinsic(per_site_scale=True))
    (name,) = adapters.shared
    twice = adapters.replace(
        shared={name: {**adapters.shared[name], "theta": 2 * adapters.shared[name]["theta"]}},
        sites={path: {**leaves, "scale": leaves["scale"] / 2} for path, leaves in adapters.sites.items()},
    )
    jax.tree.map(np.testing.assert_array_equal, deltas(adapters), deltas(twice))


def test_gradients_are_the_projections_transposed_and_zero_for_scales_at_the_start():
    adapters = intrinsic(per_site_scale=True)
    (name,) = adapters.shared

    @jax.jit
    def gradient(adapters):
        train, frozen = lr.partition(adapters)
        weights = {f"{n}/kernel": w["kernel"] for n, w in PARAMS.items()}

        def total(train):  # linear in the updates: the gradient of each is its own weight
            return sum((f.change * weights[p]).sum() for p, f in lr.expand(lr.join(train, frozen)).items())

        return jax.grad(total)(train)

    start = gradient(adapters)
    for path in adapters.sites:
        assert (np.asarray(start[path]["scale"]) == 0).all()
    assert np.abs(start["shared:" + name]["theta"]).min() > 0
    far, expected = moved(adapters), 0
    found = gradient(far)
    for path, leaves in far.sites.items():
        weight = np.float64(PARAMS[path.split("/")[0]]["kernel"]).ravel()
        p = (weight.size / SIZE) ** 0.5 * numpy_projection("fastfood", np.asarray(leaves["seed"]), weight.size, 23)
        expected = expected + float(leaves["scale"][0]) * p.T @ weight
        np.testing.assert_allclose(found[path]["scale"], [weight @ p @ theta_of(far)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["shared:" + name]["theta"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"projection": "sparse"}, {"per_site_scale": True, "normalise": "site"}], ids=["did", "said"]
)
def test_it_starts_at_the_base_and_trains_theta_and_scales(fields):
    weight = kernel(3, 8, 6)
    adapters = adapt(weight, lr.intrinsic(12, **fields))
    start = deltas(adapters)[PATH]
    assert not start.any() and start.shape == (3, 8, 6)
    *_, last = training(adapters, weight, optax.adam(1e-2), 3)
    moves = (
        (leaves_of(last)["scale"] != 1).all() if "per_site_scale" in fields else (leaves_of(last)["scale"] == 1).all()
    )
    assert moves and theta_of(last).all()
    np.testing.assert_array_equal(leaves_of(last)["seed"], leaves_of(adapters)["seed"])


@pytest.mark.parametrize("projection", ["fastfood", "dense", "sparse"])
@pytest.mark.parametrize("dimension", [9, 10])
def test_ten_constraints_take_ten_dimensions(projection, dimension):
    """The paper's toy: a thousand numbers in ten groups, each of which has to sum to its index."""
    params = {"layer": {"kernel": jnp.zeros((10, 100))}}
    adapters = intrinsic(dimension, params, projection=projection)
    (name,) = adapters.shared

    def loss(theta):
        forms = lr.expand(adapters.replace(shared={name: {**adapters.shared[name], "theta": theta}}))
        return jnp.mean((forms["layer/kernel"].change.sum(-1) - jnp.arange(1, 11)) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    host = lambda theta: [np.float64(x) for x in value_and_grad(jnp.asarray(theta, jnp.float32))]  # noqa: E731
    start, _ = host(np.zeros(dimension))
    found = minimize(host, np.zeros(dimension), jac=True, method="BFGS", options={"gtol": 1e-9}).fun
    p = numpy_projection(projection, np.asarray(adapters.sites["layer/kernel"]["seed"]), 1000, dimension)
    groups, wanted = p.reshape(10, 100, dimension).sum(1), np.arange(1, 11)
    least = np.mean((groups @ np.linalg.lstsq(groups, wanted)[0] - wanted) ** 2)
    assert start == np.mean(wanted**2)
    assert (found < 1e-6 * start) == (dimension >= 10)
    assert abs(found - least) < 1e-6 * start


def test_only_some_layers_of_a_stack():
    params = params_of(kernel(3, 8, 6))
    plan = lr.plan(params, {"layer/kernel": lr.on_layers(lr.intrinsic(20, per_site_scale=True), [0, 2])})
    adapters = lr.init(jax.random.key(0), params, plan)
    assert plan.trainable == 20 and theta_of(adapters).shape == (18,)
    adapters = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, adapters)
    merged = jax.jit(lr.merge)(params, adapters)["layer"]["kernel"]
    same = np.asarray(merged == params["layer"]["kernel"]).all((1, 2))
    assert same.tolist() == [False, True, False]


def test_a_bfloat16_base_is_rounded_once():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapters = moved(intrinsic(params=params))
    merged = jax.jit(lr.merge)(params, adapters)
    for path, delta in deltas(adapters).items():
        name = path.split("/")[0]
        exact = np.float32(params[name]["kernel"]) + np.asarray(delta)
        np.testing.assert_array_equal(merged[name]["kernel"], jnp.asarray(exact).astype(jnp.bfloat16))


def test_bad_fields_and_weights_are_refused():
    with pytest.raises(ValueError, match=r"intrinsic\(dimension=0\): expected a whole number of at least 1"):
        lr.intrinsic(0)
    with pytest.raises(ValueError, match=r"intrinsic\(dimension=2.5\): expected a whole number"):
        lr.intrinsic(2.5)
    with pytest.raises(ValueError, match=r"intrinsic\(seed='a'\): expected a whole number"):
        lr.intrinsic(2, seed="a")
    with pytest.raises(ValueError, match=r"intrinsic\(projection='haar'\): expected one of 'fastfood'"):
        lr.intrinsic(2, projection="haar")
    with pytest.raises(ValueError, match=r"intrinsic\(normalise='no'\): expected one of 'model', 'site'"):
        lr.intrinsic(2, normalise="no")
    with pytest.raises(ValueError, match=r"intrinsic\(dimension=2\): .* 2 .*scales.*at least 3"):
        _ = lr.plan(PARAMS, {".*": lr.intrinsic(2, per_site_scale=True)}).trainable
    with pytest.raises(ValueError, match=rf"intrinsic\(dimension=900\): .* only {SIZE} numbers.*lowrank_jax.full"):
        _ = lr.plan(PARAMS, {".*": lr.intrinsic(900)}).trainable
    huge = {"layer": {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)}}
    with pytest.raises(ValueError, match=r"intrinsic at layer/kernel: .*2\*\*31"):
        lr.plan(huge, {".*": lr.intrinsic(10)})
    with pytest.raises(ValueError, match=r"norm/scale.*intrinsic applies to conv, dense, embed weights only"):
        lr.plan({"norm": {"scale": jnp.ones(3)}}, {".*": lr.intrinsic(2)})
