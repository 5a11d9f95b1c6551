"""1-bit adapters: what is forward, what trains, what is stored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, params_of, training

import lowrank_jax as lr
from lowrank_jax import checkpoint
from lowrank_jax.forms import Call

K = kernel(48, 40)


def test_factors_are_two_values_of_the_median_rule():
    adapters = adapt(K, lr.one_bit(rank=8))
    form, p = lr.expand(adapters)[PATH], leaves_of(adapters)
    for name in ("a", "b"):
        factor, w = np.asarray(getattr(form, name), np.float64), p[name]
        assert len(np.unique(factor)) == 2
        np.testing.assert_allclose(np.abs(factor - w.mean()) / w.std(ddof=1), 0.67449, atol=1e-5)


def test_init_is_tiny_and_not_zero():
    p = leaves_of(adapt(kernel(400, 300), lr.one_bit(rank=32)))
    assert 0.98 * 400**-0.5 < np.abs(p["a"]).max() <= 400**-0.5
    assert 0.0019 < np.abs(p["b"]).max() <= 0.002 and abs(p["b"].mean()) < 5e-5
    # A normal cut at two deviations has 0.8796 of its deviation left.
    np.testing.assert_allclose(p["b"].std(), 0.8796e-3, rtol=0.03)
    assert not lr.one_bit().exact_init


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize(("bits", "activation"), [(1, None), (1, "relu"), (3, None)])
def test_the_packed_adapter_is_the_trained_one(bits, activation, layers):
    weight = kernel(*layers, 48, 40)
    adapters = adapt(weight, lr.one_bit(rank=8, alpha=16, bits=bits, activation=activation, dropout=0.1))
    moved = adapters.replace(sites=jax.tree.map(lambda x: x + 0.1 * kernel(*x.shape, seed=3), adapters.sites))
    small = lr.compact(moved)
    assert small.plan.entries[0].method.name == "one_bit_packed" and small.plan.trainable == 0
    for one, two in zip(*(jax.tree.leaves(lr.expand(x)[PATH]) for x in (moved, small)), strict=True):
        assert (one == two).all()
    if not layers:
        x = kernel(5, 48, seed=6)
        call = Call("dense", x, x @ weight, weight, jnp.matmul)
        assert (lr.expand(moved)[PATH].apply(call) == lr.expand(small)[PATH].apply(call)).all()


def test_the_file_is_a_bit_a_number(tmp_path):
    """ViT-B shapes: 12 blocks with two adapted weights of 768 x 768, rank 32."""
    params = {f"block_{n}": {w: {"kernel": jnp.zeros((768, 768))} for w in ("query", "value")} for n in range(12)}
    base = checkpoint.base_reference("zeros", params)
    sizes = {}
    for name, method in (("lora", lr.lora(rank=32)), ("bits", lr.one_bit(rank=32))):
        adapters = lr.compact(lr.init(jax.random.key(0), params, lr.plan(params, {".*": method})))
        where = checkpoint.save_adapter(tmp_path / name, adapters, base)
        sizes[name] = (where / "adapter.safetensors").stat().st_size
        loaded = checkpoint.load_adapter(where, params, base)
        assert loaded.plan == adapters.plan
        for one, two in zip(jax.tree.leaves(loaded.sites), jax.tree.leaves(adapters.sites), strict=True):
            assert one.dtype == two.dtype and (one == two).all()
    numbers = 24 * 2 * 768 * 32
    assert sizes["lora"] - 4 * numbers < 10_000
    assert numbers / 8 + 48 * 8 <= sizes["bits"] < numbers / 8 + 48 * 8 + 15_000  # the names of 96 tensors
    assert sizes["lora"] > 29 * sizes["bits"]
    assert json.loads((where / "adapter.json").read_text())["plan"][0]["method"] == "one_bit_packed"


def test_it_learns():
    adapters = adapt(K, lr.one_bit(rank=8))
    trained = list(training(adapters, K, optax.adamw(1e-2), 100))[-1]
    x, target = kernel(7, 48, seed=1), kernel(7, 40, seed=2)
    loss = lambda adapters: float(jnp.sum((x @ (K + delta(adapters, K)) - target) ** 2))  # noqa: E731
    assert loss(trained) < 0.5 * loss(adapters)
    assert len(np.unique(np.asarray(lr.expand(trained)[PATH].a))) == 2


def test_a_packed_adapter_can_be_merged_and_made():
    adapters = adapt(K, lr.one_bit(rank=8))
    merged, small = (lr.merge(params_of(K), x)["layer"]["kernel"] for x in (adapters, lr.compact(adapters)))
    np.testing.assert_allclose(merged, small, atol=1e-6)
    fresh = adapt(K, lr.build("one_bit_packed", {"rank": 8}))
    np.testing.assert_allclose(delta(fresh, K), delta(lr.compact(adapters), K), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("fields", [{"bits": 0}, {"bits": 9}, {"activation": "swish"}, {"dropout": 1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"one_bit\\({next(iter(fields))}="):
        lr.one_bit(**fields)
