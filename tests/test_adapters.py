"""Adapter trees: init, partition, masks, counts, restriction to layers, stacking, adding, sharding."""

import conformance_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lowrank_jax as lr
from lowrank_jax.forms import UnsupportedError

KERNEL = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
PARAMS = {"one": {"kernel": KERNEL}, "two": {"kernel": 2 * KERNEL}}


def make(method, params=PARAMS, pattern=".*", seed=0, **more):
    return lr.init(jax.random.key(seed), params, lr.plan(params, {pattern: method}), **more)


def same(one, two):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, two))


def test_randomness_depends_on_key_and_path_only():
    both, alone = make(lr.lora(2)), make(lr.lora(2), pattern="two")
    assert same(both.sites["two/kernel"], alone.sites["two/kernel"])
    assert same(both, make(lr.lora(2)))
    assert not same(both.sites["one/kernel"], both.sites["two/kernel"])
    assert not same(both.sites, make(lr.lora(2), seed=1).sites)
    np.random.seed(0)
    before = np.random.random()
    np.random.seed(0)
    make(lr.lora(2))
    assert np.random.random() == before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_storage_dtype_is_asked_for_not_inherited(dtype):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert {x.dtype for x in jax.tree.leaves(make(lr.lamda(2), params, dtype=dtype))} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(make(lr.lamda(2), params))} == {jnp.dtype(jnp.float32)}


def test_partition_and_join_are_inverse():
    adapters = make(lr.lamda(2, freeze=0.5))
    for step in (0, 5):
        train, frozen = lr.partition(adapters, step, 10)
        assert set(train["one/kernel"]) == ({"m", "b"} if step == 0 else {"m"})
        assert not set(train["one/kernel"]) & set(frozen.sites["one/kernel"])
        assert same(lr.join(train, frozen).sites, adapters.sites)
        mask = lr.mask(adapters, step, 10).sites["one/kernel"]
        assert {n for n, trained in mask.items() if trained} == set(train["one/kernel"])


def test_count_is_of_the_arrays():
    count = lr.count(make(lr.lamda(2)))
    assert count.trainable == 2 * (4 + 12) and count.frozen == 2 * (16 + 4 + 12)
    assert count.bytes == 4 * (count.trainable + count.frozen)


@pytest.mark.parametrize("bad", [{"one": {"kernel": KERNEL}}, {**PARAMS, "two": {"kernel": KERNEL.T}}])
def test_parameters_of_another_model_are_refused(bad):
    plan = lr.plan(PARAMS, {".*": lr.lora(2)})
    with pytest.raises(
        ValueError,
        match=r"two/kernel (is missing|has shape \(6, 8\)) in these parameters; the plan was made for shape \(8, 6\)",
    ):
        lr.init(jax.random.key(0), bad, plan)


@pytest.mark.parametrize("method", [lr.lora(3, 6), lr.lamda(3, 6), lr.pissa(3, 6)], ids=lambda m: m.name)
@pytest.mark.parametrize("bridge", models.BRIDGES)
def test_layers_of_a_stack_act_like_the_same_layers_unrolled(bridge, method):
    """A rule for layer 1 of a scanned model equals the rule for ``layers_1`` of the unrolled one."""
    plain, scanned = models.build(bridge, "mixed"), models.build(bridge, "mixed", "scanned")
    rule = {r"layers.*(split|join)": lr.on_layers(method, [1])}
    small, large = (
        lr.init(jax.random.key(0), m.params, lr.plan(m.params, rule, sites=m.sites)) for m in (plain, scanned)
    )
    assert {e.site.path: e.layers for e in large.plan.entries} == {
        "layers/join/kernel": (1,),
        "layers/split/kernel": (1,),
    }
    assert len(small.plan.entries) == 2 and small.plan.trainable == large.plan.trainable
    random = np.random.default_rng(1)
    laid = {}
    for path in sorted(small.sites):
        leaves = {
            n: x + 0.3 * jnp.asarray(random.standard_normal(x.shape), x.dtype) for n, x in small.sites[path].items()
        }
        small.sites[path] = leaves
        laid[path.replace("layers_1", "layers").replace("layers/1", "layers")] = {n: x[None] for n, x in leaves.items()}
    large = large.replace(sites=laid)
    expected = jax.jit(plain.apply)(plain.params, small, *plain.args)
    assert float(jnp.abs(expected - plain.run(plain.params, *plain.args)).max()) > 1e-2
    np.testing.assert_allclose(jax.jit(scanned.apply)(scanned.params, large, *scanned.args), expected, atol=2e-5)
    merged = lr.merge(scanned.params, large)
    np.testing.assert_allclose(scanned.run(merged, *scanned.args), expected, atol=2e-5)
    for name in ("split", "join"):
        assert (merged["layers"][name]["kernel"][0] == scanned.params["layers"][name]["kernel"][0]).all()


@pytest.mark.parametrize("bridge", models.BRIDGES)
def test_leaves_lie_on_the_mesh_beside_their_kernels(bridge):
    model = models.build(bridge, "mixed", "mesh")
    sites = {p: s for p, s in model.sites.items() if s.kind != "param"}
    adapters = lr.init(jax.random.key(0), model.params, lr.plan(model.params, {".*": lr.lamda(2)}, sites=sites))
    specs = {p: {n: x.sharding.spec for n, x in leaves.items()} for p, leaves in adapters.sites.items()}
    assert specs["layers/split/kernel"] == {
        "a": P(None, "fsdp", None), "m": P(None, None, None), "b": P(None, None, "tensor"),
        "m0": P(None, None, None), "b0": P(None, None, "tensor"),
    }  # fmt: skip
    assert specs["layers/join/kernel"]["a"] == P(None, "tensor", None) and specs["layers/join/kernel"]["b"] == P(
        None, None, "fsdp"
    )
    assert specs["embed/embedding"]["a"] == P("tensor", None) and specs["embed/embedding"]["b"] == P(None, "fsdp")
    # A convolution's in axis is made of two, the later one sharded: flattened, no sharding of it survives.
    assert specs["conv/kernel"]["a"] == P(None, None) and specs["conv/kernel"]["b"] == P(None, "tensor")
    shard = adapters.sites["layers/split/kernel"]["a"].addressable_shards[0].data
    assert shard.shape == (2, 4, 2)


def test_stack_and_take():
    one, two = make(lr.lora(2)), make(lr.lora(2), seed=1)
    stacked = lr.stack([one, two])
    assert same(lr.take(stacked, 1), two) and stacked.stacked == 2
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=f"index {bad} outside a stack of 2"):
            lr.take(stacked, bad)
    with pytest.raises(ValueError, match="adapter 1 has another plan than adapter 0"):
        lr.stack([one, make(lr.lora(3))])
    with pytest.raises(ValueError, match="already a stack"):
        lr.stack([stacked])
    with pytest.raises(ValueError, match="at least one"):
        lr.stack([])
    folded = lr.fold(PARAMS, make(lr.pissa(2)))[1]
    with pytest.raises(ValueError, match="folded: unfold it"):
        lr.stack([folded])


def test_added_adapters_both_act():
    one, two = (jax.tree.map(lambda x: x + 0.1, make(method)) for method in (lr.lora(2), lr.pissa(1)))
    both = lr.add(one, two)
    merged = lr.merge(PARAMS, both)["one"]["kernel"]
    parts = [lr.merge(PARAMS, x)["one"]["kernel"] - KERNEL for x in (one, two)]
    np.testing.assert_allclose(merged, KERNEL + sum(parts), atol=1e-5)
    np.testing.assert_allclose(merged, lr.merge(lr.merge(PARAMS, one), two)["one"]["kernel"], atol=1e-5)
    other = lr.add(make(lr.lora(2), pattern="one"), make(lr.full(), pattern="two"))
    assert {e.method.name for e in other.plan.entries} == {"lora", "full"}
    with pytest.raises(UnsupportedError, match="full cannot be combined with another method"):
        lr.add(one, make(lr.full()))


def test_adapters_are_transparent_to_tree_functions():
    adapters = make(lr.lamda(2))
    doubled = jax.tree.map(lambda x: 2 * x, adapters)
    assert doubled.plan is adapters.plan and not doubled.folded
    assert same(jax.jit(lambda a: a)(adapters), adapters)


def test_adding_refuses_shared_leaves_that_differ():
    params = {name: {"kernel": jnp.ones((6, 5))} for name in "xy"}
    make = lambda site, seed: lr.init(jax.random.key(seed), params, lr.plan(params, {site: lr.vera(rank=3)}))  # noqa: E731
    assert len(lr.add(make("x", 0), make("y", 0)).plan.entries) == 2
    with pytest.raises(UnsupportedError, match="leaves of vera.* common to their sites, and they differ"):
        lr.add(make("x", 0), make("y", 1))
