"""FLoRA: its update has a low rank along every axis of the kernel; counts, init, first steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, leaves_of, loss

import lowrank_jax as lr


def conv(*shape):
    """The parameters and the site of a convolution's kernel."""
    n = len(shape)
    site = lr.Site(PATH, "conv", shape, "float32", (), tuple(range(n - 1)), (n - 1,))
    return {"layer": {"kernel": kernel(*shape)}}, {PATH: site}


def adapted(params, sites, **fields):
    """An adapter with random factors, far from init."""
    plan = lr.plan(params, {"layer": lr.flora(**fields)}, sites=sites)
    adapters = lr.init(jax.random.key(0), params, plan)
    random = {name: kernel(*leaf.shape, seed=n) for n, (name, leaf) in enumerate(adapters.sites[PATH].items())}
    return adapters.replace(sites={PATH: random})


def mode_ranks(update):
    """The rank of the unfolding along each axis."""
    unfold = lambda axis: np.moveaxis(update, axis, 0).reshape(update.shape[axis], -1)  # noqa: E731
    return tuple(
        int(np.linalg.matrix_rank(unfold(axis), tol=1e-5 * np.abs(update).max())) for axis in range(update.ndim)
    )


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 9, 10), (2, 3, 4)), ((5, 4, 9, 10), (2, 2, 3, 4)), ((3, 4, 3, 7, 8), (2, 2, 2, 3, 4))]
)
def test_every_axis_of_the_kernel_has_its_rank(shape, expected):
    params, sites = conv(*shape)
    adapters = adapted(params, sites, rank=3, out_rank=4)
    update = np.asarray(lr.merge(params, adapters)["layer"]["kernel"] - params["layer"]["kernel"], np.float64)
    assert mode_ranks(update) == expected
    # The control: LoRA on the flattened kernel keeps the ranks of its two sides only.
    lora = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(rank=4)}, sites=sites))
    moved = jax.tree.map(lambda x: x + kernel(*x.shape, seed=9), lora)
    flat = np.asarray(lr.merge(params, moved)["layer"]["kernel"] - params["layer"]["kernel"], np.float64)
    assert mode_ranks(flat)[:-1] == shape[:-1]


def test_a_window_of_one_is_the_dense_update():
    params, sites = conv(1, 1, 9, 10)
    adapters = adapted(params, sites, rank=3)
    p = leaves_of(adapters)
    dense = adapt(kernel(9, 10), lr.flora(rank=3))
    scaled = p["core"][0, 0] * p["in0"][0, 0] * p["in1"][0, 0]
    same = {"core": scaled, "in0": p["in2"], "out": p["out"]}
    dense = dense.replace(sites={PATH: {name: jnp.asarray(leaf, jnp.float32) for name, leaf in same.items()}})
    one, two = (lr.expand(a)[PATH].delta(kernel(9, 10)) for a in (adapters, dense))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())


def test_counts_as_the_paper():
    params, sites = conv(3, 3, 256, 512)
    assert lr.plan(params, {"layer": lr.flora()}, sites=sites).trainable == 13324
    weight = kernel(40, 30)
    assert lr.count(adapt(weight, lr.flora(rank=3, out_rank=5))).trainable == 3 * 5 + 40 * 3 + 30 * 5


def test_starts_at_the_base_and_the_core_learns_first():
    weight = kernel(400, 300)
    adapters = adapt(weight, lr.flora(rank=16, out_rank=4))
    p = leaves_of(adapters)
    assert not p["core"].any()
    for name, r in (("in0", 16), ("out", 4)):
        # 1200 draws at least: a standard error of the deviation of 2%.
        assert abs(p[name].std() / (0.5 / r) ** 0.5 - 1) < 0.07
    gradient = jax.grad(loss)(*lr.partition(adapters), weight)[PATH]
    assert {name for name, g in gradient.items() if np.asarray(g).any()} == {"core"}
    moved = jax.tree.map(lambda x, g: x - 1e-6 * g, lr.partition(adapters)[0][PATH], gradient)
    second = jax.grad(loss)({PATH: moved}, lr.partition(adapters)[1], weight)[PATH]
    assert all(np.asarray(g).any() for g in second.values())


def test_drops_the_input_in_training():
    form = lr.expand(adapted(*conv(3, 9, 10), rank=3, dropout=0.5))[PATH]
    assert form.dropout == 0.5 and form.as_low_rank().dropout == 0.5


@pytest.mark.parametrize(
    ("fields", "message"), [({"rank": 0}, "rank=0"), ({"out_rank": 0}, "rank=0"), ({"window_rank": 0}, "rank=0"),
                            ({"dropout": 1.0}, r"flora\(dropout=1.0\)")]
)  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        lr.flora(**fields)


@pytest.mark.parametrize(
    ("fields", "message"), [({"rank": 10}, "rank 10 is not between 1 and 9"),
                            ({"rank": 9, "out_rank": 31}, "rank 31 is not between 1 and 30")]
)  # fmt: skip
def test_a_rank_above_its_axis_names_the_site(fields, message):
    """The channels bound the rank, not the flattened window."""
    params, sites = conv(3, 9, 30)
    with pytest.raises(ValueError, match=f"flora at layer/kernel: {message}"):
        lr.plan(params, {"layer": lr.flora(**fields)}, sites=sites)
