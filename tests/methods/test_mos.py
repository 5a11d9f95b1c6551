"""MoS: factors put together from common shards; what tells layers apart, one trick at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import adapt, kernel, training

import lowrank_jax as lr

WIDTH, LAYERS = 12, 4
FIELDS = {"rank": 4, "budget": 2, "shards": 3, "private": 1, "alpha": 8}


def params_of(prefix="layers_{}"):
    return {prefix.format(n): {"q": {"kernel": kernel(WIDTH, 10, seed=n)}} for n in range(LAYERS)}


def mos(params=None, **fields):
    params = params_of() if params is None else params
    plan = lr.plan(params, {".*": lr.mos(**{**FIELDS, **fields})})
    return lr.init(jax.random.key(0), params, plan)


def moved(adapters):
    random = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(random.standard_normal(x.shape), jnp.float32) if x.dtype == jnp.float32 else x

    return jax.tree.map(draw, adapters)


def updates(adapters):
    return [np.asarray(form.delta(jnp.zeros((WIDTH, 10))), np.float64) for form in lr.expand(adapters).values()]


def shared_of(adapters):
    (shared,) = adapters.shared.values()
    return shared


def used(adapters):
    """The number of the shard in every place of every layer's common directions, ``{side: [layers, directions, shards]}``."""
    fields = dict(adapters.plan.entries[0].method.config)
    (group,) = adapters.shared
    number = lambda pool: jnp.broadcast_to(jnp.arange(len(pool), dtype=jnp.float32)[:, None], pool.shape)  # noqa: E731
    forms = lr.expand(adapters.replace(shared={group: jax.tree.map(number, shared_of(adapters))})).values()
    drawn = fields["rank"] - fields["private"]
    a = np.stack([np.asarray(form.a).T[:drawn, :: -(-WIDTH // fields["shards"])] for form in forms])
    b = np.stack([np.asarray(form.b)[:drawn, :: -(-10 // fields["shards"])] for form in forms])
    return {"a": a.astype(int), "b": b.astype(int)}


def test_without_its_tricks_it_is_pure_sharing():
    """Whole vectors, all of the pool, in pairs, nothing private: every layer has the same update."""
    adapters = moved(mos(rank=8, budget=2, shards=1, private=0, dissociate=False))
    first, *rest = updates(adapters)
    assert np.linalg.matrix_rank(first, tol=1e-5) == 8
    for other in rest:
        np.testing.assert_allclose(other, first, atol=1e-4)


@pytest.mark.parametrize(
    "trick", [{"rank": 4}, {"dissociate": True}, {"shards": 2, "dissociate": True}, {"private": 1}], ids=str
)
def test_each_trick_tells_layers_apart(trick):
    sharing = {"rank": 8, "budget": 2, "shards": 1, "private": 0, "dissociate": False}
    found = updates(moved(mos(**{**sharing, **trick})))
    for n, one in enumerate(found):
        assert all(np.abs(one - other).max() > 0.1 for other in found[:n])


def test_all_private_it_is_lora():
    """Step by step, from the same factors."""
    weight = kernel(WIDTH, 10)
    ours = adapt(weight, lr.mos(rank=3, budget=3, private=3, alpha=6))
    assert set(ours.sites["layer/kernel"]) == {"a", "b"} and not jax.tree.leaves(ours.shared)
    lora = adapt(weight, lr.lora(rank=3, alpha=6)).replace(sites=ours.sites)
    for one, two in zip(*(training(x, weight, optax.adamw(1e-2), 4) for x in (ours, lora)), strict=True):
        assert jax.tree.map(np.array_equal, one.sites, two.sites) == {"layer/kernel": {"a": True, "b": True}}


def test_shards_are_drawn_apart_and_not_twice():
    adapters = mos()
    found, size = used(adapters), LAYERS * 3
    assert {len(pool) for pool in shared_of(adapters).values()} == {size}
    for side in "ab":
        assert found[side].shape == (LAYERS, 3, 3)
        for layer in found[side].reshape(LAYERS, -1):
            assert len(set(layer)) == 9 and set(layer) <= set(range(size))
        assert len({tuple(layer) for layer in found[side].reshape(LAYERS, -1).tolist()}) == LAYERS
    assert (found["a"] != found["b"]).any(axis=(1, 2)).all()
    paired = used(mos(dissociate=False))
    assert (paired["a"] == paired["b"]).all()
    again, other = used(mos()), used(lr.init(jax.random.key(1), params_of(), adapters.plan))
    assert (again["a"] == found["a"]).all() and (other["a"] != found["a"]).any()


def test_a_small_pool_is_drawn_evenly():
    """One layer needs 9 shards of a pool of 3."""
    params = {"layers_0": {"q": {"kernel": kernel(WIDTH, 10)}}}
    found = used(mos(params))
    assert np.bincount(found["a"].ravel()).tolist() == np.bincount(found["b"].ravel()).tolist() == [3, 3, 3]


def test_a_shard_gets_the_gradients_of_all_its_places():
    adapters = moved(mos())
    train, frozen = lr.partition(adapters)

    def total(train):  # linear in b, with known gradients
        forms = lr.expand(lr.join(train, frozen))
        return sum((form.b * kernel(*form.b.shape, seed=9 + n)).sum() for n, form in enumerate(forms.values()))

    (group,) = adapters.shared
    gradient = next(g for n, g in jax.grad(total)(train)["shared:" + group].items() if ".b" in n)
    expected = np.zeros((12, 4))
    for n, layer in enumerate(used(adapters)["b"]):
        g = np.pad(
            np.asarray(kernel(4, 10, seed=9 + n), np.float64), ((0, 0), (0, 2))
        )  # 10 = 4 + 4 + 2: the last shard is cut
        for direction, places in enumerate(layer):
            for place, shard in enumerate(places):
                expected[shard] += g[direction, 4 * place : 4 * place + 4]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5)


def test_where_it_starts():
    assert not any(update.any() for update in updates(mos()))
    params = {f"layers_{n}": {"q": {"kernel": jnp.zeros((400, 10))}} for n in range(30)}
    adapters = mos(params, shards=4)
    shared, bound = shared_of(adapters), 400**-0.5
    assert set(shared) == {"layers.q.kernel.a400", "layers.q.kernel.b10"}
    pool = np.asarray(shared["layers.q.kernel.a400"])
    assert 0.99 * bound < np.abs(pool).max() < bound and abs(np.var(pool) * 3 / bound**2 - 1) < 0.05
    assert not shared["layers.q.kernel.b10"].any()


def test_layers_of_a_type_share_however_they_are_kept():
    """``layers_0``, ``layers/0`` and a scanned stack are the same four layers; other modules have pools of their own."""
    stack = {"layers": {"q": {"kernel": kernel(LAYERS, WIDTH, 10), "bias": jnp.zeros((LAYERS, 10))}}}
    nested = {"layers": {str(n): {"q": {"kernel": kernel(WIDTH, 10)}} for n in range(LAYERS)}}
    shapes = []
    for params in (params_of(), nested, stack):
        adapters = lr.init(jax.random.key(0), params, lr.plan(params, {".*q/kernel": lr.mos(**FIELDS)}))
        shapes.append(jax.tree.map(jnp.shape, shared_of(adapters)))
    assert shapes == [{"layers.q.kernel.a12": (12, 4), "layers.q.kernel.b10": (12, 4)}] * 3
    two = {"layers_0": {name: {"kernel": kernel(WIDTH, 10)} for name in "qv"}}
    assert len(shared_of(mos(two))) == 4
    assert {len(pool) for pool in shared_of(mos(two, pools="size")).values()} == {6}


def test_the_count_is_that_of_lora_of_the_budget():
    for rank in (4, 8):
        assert mos(rank=rank, shards=2).plan.trainable == LAYERS * 2 * (WIDTH + 10)


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"dropout": 1.0}, {"pools": "all"}, {"shards": 0}, {"budget": 9}, {"budget": 0}, {"private": 3}, {"private": -1},
     {"private": 2}],
    ids=str,
)  # fmt: skip
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        lr.mos(**fields)


def test_pools_that_cannot_be_paired_are_refused():
    params = {name: {"kernel": kernel(*shape)} for name, shape in {"q": (12, 10), "up": (12, 30)}.items()}
    adapters = mos(params, pools="size", dissociate=False)
    with pytest.raises(ValueError, match="mos at q/kernel: dissociate=False pairs the shards of two pools"):
        lr.expand(adapters)
