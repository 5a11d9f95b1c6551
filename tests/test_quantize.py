"""Quantised bases: what is held, what it computes, and that nothing larger than a layer is ever dense."""

from __future__ import annotations

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import lowrank_jax as lr
from lowrank_jax import models, unread
from lowrank_jax.checkpoint import base_reference
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.memory import abstract_adapters
from lowrank_jax.models.trees import param_shapes
from lowrank_jax.quantized import Quantized, is_quantized
from lowrank_jax.sites import flatten
from lowrank_jax.unread import Unread

LINEAR = r"layers.*/.*_proj"
BYTES = {"int8": 1 + 4 / 32, "nf4": 1 / 2 + 2 / 32}  # a number, in blocks of 32
KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


@functools.cache
def llama(**fields):
    config = models.LlamaConfig.tiny(scan_layers=True, **fields)
    model = models.build(config)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]


TOKENS = jax.random.randint(jax.random.key(9), (2, 8), 0, 97)


def lora_on(base, rank=2):
    plan = lr.plan(base, {LINEAR: lr.lora(rank)}, sites=lr.linen.sites(llama()[0], base, TOKENS))
    return jax.tree.map(lambda x: x + 0.05, lr.init(jax.random.key(1), base, plan))


def distance(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


@KINDS
def test_the_values_are_those_of_qwix_and_the_bytes_are_what_is_held(kind):
    weight = jax.random.normal(jax.random.key(0), (3, 128, 8), jnp.bfloat16)
    ours = lr.quantize({"kernel": weight}, {"kernel": kind}, block=32)["kernel"]
    qtype = jnp.int8 if kind == "int8" else kind
    theirs = qwix.quantize(
        weight.astype(jnp.float32), qtype, channelwise_axes=(0, 2), tiled_axes={1: 32}, scale_dtype=ours.scales.dtype
    )
    theirs = qwix.dequantize(theirs.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert (ours.shape, ours.dtype, ours.block) == (weight.shape, weight.dtype, 32)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(ours)) == ours.nbytes == BYTES[kind] * weight.size
    assert all(leaf.dtype.itemsize * leaf.size == leaf.nbytes for leaf in jax.tree.leaves(ours))  # no sub-byte dtype


@KINDS
def test_a_model_runs_on_them_as_it_is_and_is_as_close_as_they_are(kind):
    model, params = llama()
    base = lr.quantize(params, {LINEAR: kind}, block=32)
    run = jax.jit(model.apply)
    exact, got, rounded = (run({"params": p}, TOKENS) for p in (params, base, lr.dequantize(base)))
    assert distance(got, rounded) == 0
    error = jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)
    assert 0 < error < {"int8": 0.02, "nf4": 0.25}[kind]
    held = [leaf for path, leaf in flatten(base).items() if path.endswith("_proj/kernel")]
    assert held and all(is_quantized(leaf) for leaf in held)
    plan = lr.plan(base, {LINEAR: lr.lora(2)}, sites=lr.linen.sites(model, base, TOKENS))
    assert plan.base_count == sum(x.size for x in jax.tree.leaves(params))
    assert plan.base_bytes == sum(x.nbytes for x in jax.tree.leaves(base))


def test_gradients_and_merged_weights_are_those_of_the_dequantised_base():
    model, params = llama()
    base = lr.quantize(params, {LINEAR: "nf4"}, block=32)
    adapters = lora_on(base)
    train, frozen = lr.partition(adapters)

    @jax.jit
    def gradient(train, base):
        return jax.grad(lambda train: (lr.linen.apply(model, base, lr.join(train, frozen), TOKENS) ** 2).sum())(train)

    assert distance(gradient(train, base), gradient(train, lr.dequantize(base))) == 0
    merged = lr.merge(base, adapters)
    assert not any(map(is_quantized, flatten(merged).values()))
    assert distance(merged, lr.merge(lr.dequantize(base), adapters)) == 0


def test_methods_that_read_the_weight_get_the_dense_one():
    model, x = nn.Dense(8), jax.random.normal(jax.random.key(0), (4, 64))
    base = lr.quantize(model.init(jax.random.key(1), x)["params"], {"kernel": "int8"})
    for method in (lr.dora(2), lr.svfit(2), lr.loldu(2)):
        adapters = lr.init(jax.random.key(1), base, lr.plan(base, {"kernel": method}))
        adapters = jax.tree.map(lambda leaf: leaf + 0.05, adapters)
        one, other = (lr.linen.apply(model, p, adapters, x) for p in (base, lr.dequantize(base)))
        assert distance(one, other) < 1e-6


def test_statistics_are_those_of_the_dequantised_base():
    model, x = nn.Dense(3), jax.random.normal(jax.random.key(0), (4, 64))
    base = lr.quantize(model.init(jax.random.key(1), x)["params"], {"kernel": "nf4"})
    plan = lr.plan(base, {"kernel": lr.lora_ga(1)})

    def loss(params, adapters, batch):
        return (lr.linen.apply(model, params, adapters, batch) ** 2).sum()

    one, other = (lr.collect(loss, p, plan, [x], progress=False).values for p in (base, lr.dequantize(base)))
    assert distance(one, other) == 0


class Stack(nnx.Module):
    """Two scanned layers and a head."""

    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(32, 32, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = make(rngs.split(2))
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        step = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(step(x, self.layers))


def test_nnx_models_too():
    model, x = Stack(nnx.Rngs(0)), jnp.ones((2, 32))
    base = lr.quantize(lr.nnx.params(model), {"layers": "nf4", "head": "int8"}, block=16)
    plan = lr.plan(base, {".*": lr.lora(2)}, sites=lr.nnx.sites(model))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, lr.init(jax.random.key(0), base, plan))
    train, frozen = lr.partition(adapters)

    @jax.jit
    def gradient(train, base):
        return jax.grad(lambda train: (lr.nnx.apply(model, base, lr.join(train, frozen), x) ** 2).sum())(train)

    assert distance(gradient(train, base), gradient(train, lr.dequantize(base))) == 0
    dense = lr.nnx.apply(model, lr.dequantize(base), adapters, x)
    nnx.update(model, base)
    assert distance(lr.nnx.attach(model, adapters)(x), dense) == 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_dense_stack_is_in_the_compiled_gradient(remat):
    """The scanned weights are 8.4 MB dense; without remat the backward pass would keep them all."""
    config = models.LlamaConfig.tiny(
        scan_layers=True, remat=remat, hidden_size=128, intermediate_size=512, num_hidden_layers=8
    )
    model, shapes = models.build(config), param_shapes(config)
    base = lr.quantize(shapes, {LINEAR: "nf4"}, block=32)
    plan = lr.plan(base, {LINEAR: lr.lora(2)}, sites=lr.linen.sites(model, base, TOKENS))
    train, frozen = lr.partition(abstract_adapters(plan))

    def loss(train, base, tokens):
        return (lr.linen.apply(model, base, lr.join(train, frozen), tokens) ** 2).mean()

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(train, base, tokens).compile().memory_analysis()
    stack = sum(leaf.size * 4 for path, leaf in flatten(shapes).items() if path.endswith("_proj/kernel"))
    assert memory.argument_size_in_bytes < stack / 2 and memory.temp_size_in_bytes < stack / 2


def test_what_is_left_of_a_weight_rounds_better_than_the_weight():
    """QPiSSA: |W - (Q(W - AB) + AB)| is less than QLoRA's |W - Q(W)|, since the residual is smaller than the weight."""
    spectrum = 2.0 ** -jnp.arange(64)  # of a trained weight: a few large directions
    turn = lambda seed: jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (2, 64, 64)))[0]  # noqa: E731
    weight = turn(0) * spectrum @ turn(1) + 0.02 * jax.random.normal(jax.random.key(2), (2, 64, 64))
    params = {"layers": {"kernel": weight, "bias": jnp.zeros((2, 64))}}
    error = lambda other: float(jnp.linalg.norm(weight - other))  # noqa: E731
    lora = error(lr.quantize(params, {"layers": "nf4"}, block=32)["layers"]["kernel"].dense())
    for method in (lr.pissa(4), lr.lamda(4)):
        adapters = lr.init(jax.random.key(3), params, lr.plan(params, {"layers": method}))
        base, folded = lr.fold(params, adapters, quantize={"layers": "nf4"}, block=32)
        assert is_quantized(base["layers"]["kernel"])
        assert error(lr.merge(base, folded)["layers"]["kernel"]) < 0.7 * lora


LAYER = 64 * 256 * 4  # bytes of the largest kernel of a layer in `directory`


@pytest.fixture
def directory(tmp_path):
    config = models.LlamaConfig.tiny(num_hidden_layers=8, intermediate_size=256)
    params = jax.jit(models.build(config).init)(jax.random.key(0), TOKENS)["params"]
    return models.save(params, config, tmp_path)


@pytest.fixture
def peak(monkeypatch):
    """The most bytes of live arrays beyond those at the start, sampled whenever something has been read from a file."""
    most, start, place = [0], sum(x.nbytes for x in jax.live_arrays()), unread.place

    def watched(*args):
        value = place(*args)
        most[0] = max(most[0], sum(x.nbytes for x in jax.live_arrays()) - start)
        return value

    monkeypatch.setattr(unread, "place", watched)
    return lambda: most[0]


def test_loading_holds_the_quantised_base_and_one_layer(directory, peak):
    loaded = models.load(directory, scan_layers=True, quantize={LINEAR: "nf4"}, block=32)
    held = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    dense = sum(leaf.size * 4 for leaf in flatten(loaded.params).values())
    assert 0 < peak() <= held + 2 * LAYER < dense / 2  # the layer before is still there when the next has been read
    whole = models.load(directory, scan_layers=True).params
    assert distance(loaded.params, lr.quantize(whole, {LINEAR: "nf4"}, block=32)) == 0


def test_so_does_starting_and_folding_from_the_file(directory, peak):
    loaded = models.load(directory, scan_layers=True, unread=True)
    assert all(isinstance(leaf, Unread) for leaf in jax.tree.leaves(loaded.params))
    sites = lr.linen.sites(loaded.model, loaded.params, TOKENS)
    adapters = lr.init(jax.random.key(0), loaded.params, lr.plan(loaded.params, {LINEAR: lr.pissa(4)}, sites=sites))
    base, folded = lr.fold(loaded.params, adapters, quantize={LINEAR: "nf4"}, block=32)
    held = sum(x.nbytes for x in jax.tree.leaves((base, adapters)))
    dense = sum(leaf.size * 4 for leaf in flatten(loaded.params).values())
    assert 0 < peak() <= held + 4 * LAYER < dense  # the layer, what left it, what is left, and the layer before
    whole = models.load(directory, scan_layers=True).params
    run = jax.jit(loaded.model.apply)
    exact, start = run({"params": whole}, TOKENS), run({"params": lr.merge(base, folded)}, TOKENS)
    plain = run({"params": lr.quantize(whole, {LINEAR: "nf4"}, block=32)}, TOKENS)
    assert jnp.linalg.norm(start - exact) < jnp.linalg.norm(plain - exact)


def test_a_file_is_read_or_quantised_or_left(directory):
    with pytest.raises(ValueError, match="give one of the two"):
        models.load(directory, unread=True, quantize={LINEAR: "nf4"})


def test_sharded_weights_stay_sharded():
    mesh = lr.shard.mesh({"fsdp": 2, "tensor": 4})
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (128, 256))}}
    laid = jax.device_put(params, lr.shard.layout(params, mesh))
    base = lr.quantize(laid, {"up": "nf4"}, block=32)["up"]["kernel"]
    spec = laid["up"]["kernel"].sharding.spec
    assert base.sharding.spec == base.scales.sharding.spec == spec
    np.testing.assert_array_equal(
        np.asarray(base), np.asarray(lr.quantize(params, {"up": "nf4"}, block=32)["up"]["kernel"])
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), laid)
    abstract = lr.quantize(shapes, {"up": "nf4"}, block=32)["up"]["kernel"]
    assert (
        isinstance(abstract, Quantized) and abstract.codes.shape == base.codes.shape and abstract.sharding.spec == spec
    )


def test_a_reference_tells_quantised_bases_apart():
    params = {"kernel": jnp.ones((64, 2))}
    each = [params, *(lr.quantize(params, {"kernel": kind}) for kind in ("int8", "nf4"))]
    assert len({base_reference("base", one).hash for one in each}) == 3


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, None)))(x)


def test_a_quantised_weight_takes_the_place_of_its_box():
    x = jnp.ones((1, 32))
    params = Boxed().init(jax.random.key(0), x)["params"]
    base = lr.quantize(params, {".*": "int8"}, block=16)
    expected = Boxed().apply({"params": lr.dequantize(base)}, x)
    assert distance(Boxed().apply({"params": base}, x), expected) == 0


PARAMS = {"layer": {"kernel": jnp.ones((64, 4)), "bias": jnp.ones(4)}, "embed": {"embedding": jnp.ones((64, 4))}}


@pytest.mark.parametrize(
    ("rules", "block", "message"),
    [
        ({"layer": "int4"}, 64, "expected 'int8' or 'nf4'"),
        ({"lyer": "nf4"}, 64, "Nearest paths: .*layer"),
        ({"embed": "nf4"}, 64, "embed/embedding, which is no kernel"),
        ({"layer": "nf4"}, 48, "64 inputs the block does not divide"),
        ({"layer": "nf4"}, 1, "an even number"),
    ],
)
def test_bad_input_names_the_remedy(rules, block, message):
    with pytest.raises(ValueError, match=message):
        lr.quantize(PARAMS, rules, block=block)


def test_without_qwix_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"lowrank_jax\[quant\]"):
        lr.quantize({"kernel": jnp.ones((6, 5))}, {"kernel": "nf4"}, block=6)  # a shape that no other test has compiled


def test_what_would_round_twice_or_make_all_of_it_dense_is_refused():
    base = lr.quantize(PARAMS, {"layer": "nf4"})
    with pytest.raises(ValueError, match="quantised already"):
        lr.quantize(base, {"layer": "int8"})
    make = lambda method: lr.init(jax.random.key(0), base, lr.plan(base, {"layer/kernel": method}))  # noqa: E731
    with pytest.raises(UnsupportedError, match="fold\\(dense, adapters, quantize"):
        lr.fold(base, make(lr.pissa(2)))
    with pytest.raises(UnsupportedError, match="full would make the whole of it dense"):
        lr.linen.apply(nn.Dense(4), base["layer"], lr.init(
            jax.random.key(0), base["layer"], lr.plan(base["layer"], {"kernel": lr.full()})), jnp.ones((1, 64)))  # fmt: skip
