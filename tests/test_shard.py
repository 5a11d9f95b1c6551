"""Layouts of weights over a mesh: by name, by shape, by pattern."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lr
from lowrank_jax import hlo, models, shard
from lowrank_jax.shard import ShardingError


def test_a_mesh_has_all_axes_and_takes_the_first_devices():
    mesh = shard.mesh({"fsdp": 2, "tensor": 2})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2, "expert": 1}
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"model": 2}, "mesh axis 'model': expected data"),
        ({"data": 0}, "at least 1"),
        ({"fsdp": 99}, "needs 99 devices; 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, said):
    with pytest.raises(ShardingError, match=said):
        shard.mesh(sizes)


def test_shapes_alone_divide_a_model_as_its_names_do():
    """Where a projection has a wide side, both ways agree on our own models."""
    config = models.smollm2_135m(scan_layers=True)
    shapes, mesh = models.param_shapes(config), shard.mesh({"fsdp": 2, "tensor": 2})
    named = shard.layout(shapes, mesh, names=models.logical_axes(config))
    sites = lr.linen.sites(models.build(config), shapes, jnp.ones((1, 8), jnp.int32))
    inferred = shard.layout(shapes, mesh, sites=sites)
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert inferred["layers"]["mlp"][part]["kernel"] == named["layers"]["mlp"][part]["kernel"]
    assert named["layers"]["mlp"]["down_proj"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert inferred["embed_tokens"]["embedding"].spec == P("tensor", "fsdp")
    assert inferred["norm"]["scale"].spec == P(None)


def test_experts_lie_over_their_axis_and_what_does_not_divide_stays_whole():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((4, 64, 96), "ebi,eio->ebo", use_bias=False, name="experts")(x)

    model, x = Experts(), jnp.ones((4, 2, 64))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    sites = lr.linen.sites(model, params, x)
    laid = shard.layout(params, shard.mesh({"expert": 4, "tensor": 2}), sites=sites)
    assert laid["experts"]["kernel"].spec == P("expert", "fsdp", "tensor")
    uneven = shard.layout(params, shard.mesh({"tensor": 5}), sites=sites)
    assert uneven["experts"]["kernel"].spec == P("expert", "fsdp", None)


def test_what_has_no_experts_lies_over_the_axis_of_experts_too():
    config = models.LlamaConfig.tiny(architecture="mixtral", num_local_experts=4)
    shapes, mesh = models.param_shapes(config), shard.mesh({"expert": 4, "fsdp": 2})
    named = shard.layout(shapes, mesh, names=models.logical_axes(config))
    assert named["embed_tokens"]["embedding"].spec[1] == ("fsdp", "expert")
    assert shard.layout({"up": {"kernel": jnp.ones((64, 96))}}, mesh)["up"]["kernel"].spec == P(
        ("fsdp", "expert"), "tensor"
    )
    assert named["layers_0"]["moe"]["experts"]["up_proj"]["kernel"].spec == P("expert", "fsdp", "tensor")


def test_a_pattern_overrides_and_adapters_follow():
    params = {"up": {"kernel": jnp.zeros((64, 128))}, "down": {"kernel": jnp.zeros((128, 64))}}
    mesh = shard.mesh({"fsdp": 4, "tensor": 2})
    laid = shard.layout(params, mesh, overrides={"down": (None, "fsdp")})
    assert laid["up"]["kernel"].spec == P("fsdp", "tensor")
    placed = jax.device_put(params, laid)
    adapters = lr.init(jax.random.key(0), placed, lr.plan(placed, {".*": lr.lora(rank=2)}))
    assert adapters.sites["down/kernel"]["b"].sharding.spec == P(None, "fsdp")
    assert adapters.sites["up/kernel"]["a"].sharding.spec == P("fsdp", None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"up": ("fsdp",)}, r"up/kernel has shape \(64, 128\); expected one mesh axis or None for each of its 2 axes"),
        ({"up": ("model", None)}, "the mesh has no axis 'model'; its axes are data, fsdp, tensor, expert"),
        ({"up": ("tensor", None)}, r"whose 64 the 3 devices of 'tensor' do not divide"),
        ({"upp": (None, None)}, "matches no weight. Nearest paths: up"),
    ],
)
def test_an_override_that_cannot_be_is_refused(overrides, said):
    with pytest.raises(ValueError, match=said):
        shard.layout({"up": {"kernel": jnp.zeros((64, 128))}}, shard.mesh({"tensor": 3}), overrides=overrides)


@pytest.mark.parametrize(
    "config", [models.LlamaConfig.tiny(scan_layers=True), models.BertConfig.tiny()], ids=["llama", "bert"]
)
def test_rows_of_activations_stay_dealt_out(config):
    mesh = shard.mesh({"fsdp": 4, "tensor": 2})
    model, shapes = models.build(config), models.param_shapes(config)
    where = shard.layout(shapes, mesh, names=models.logical_axes(config))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32, sharding=NamedSharding(mesh, P(shard.ROWS)))

    def loss(params, tokens):
        out = model.apply({"params": params}, tokens)
        return (out if isinstance(out, jax.Array) else out.hidden).astype(jnp.float32).var()

    def sent():
        return hlo.read(jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()).sent

    loose = sent()
    with jax.set_mesh(mesh):
        assert sent() < loose
