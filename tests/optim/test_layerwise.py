"""One layer at a time: the step is that of the whole gradient, and the whole gradient never exists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

import lowrank_jax as lr
from lowrank_jax.models import LlamaConfig, build
from lowrank_jax.models.llama_parts import join_layers, llama_parts, split_layers
from lowrank_jax.optim import galore, scale_by_adam_8bit
from lowrank_jax.optim.layerwise import LayerwiseState, ModelParts, layerwise_update
from train.tasks import causal_lm

AFTER = (optax.add_decayed_weights(0.1), optax.scale_by_schedule(lambda count: -0.02 / (1 + count)))
ADAM = optax.chain(optax.scale_by_adam(eps=1e-3), *AFTER)
OPTIMIZERS = {
    "adamw": ADAM,
    "galore": optax.chain(galore(optax.scale_by_adam(eps=1e-3), 3, refresh_every=2, svd="exact"), *AFTER),
    "8-bit": optax.chain(scale_by_adam_8bit(eps=1e-3, min_size=1, block=64), *AFTER),
    # Exact: where two programs find subspaces that differ in their last bits, moments near a boundary take other codes.
    "8-bit galore": optax.chain(galore(scale_by_adam_8bit(eps=1e-3, min_size=1, block=32), 3, svd="exact"), *AFTER),
}


def llama(**options):
    config = LlamaConfig.tiny(scan_layers=True, **options)
    model = build(config)
    params = model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    return config, model, params


def batch_of(seed, masked=True):
    tokens = jax.random.randint(jax.random.key(seed), (4, 10), 0, 97)
    lengths = jnp.array([10, 7, 4, 9])[:, None]
    return {"tokens": tokens, **({"loss_mask": jnp.arange(10) < lengths} if masked else {})}


def loss_of(model, params, batch):
    """As training has it: the sum over the learned tokens by their number."""
    batch = {"loss_mask": jnp.ones(batch["tokens"].shape, bool), **batch}
    task = causal_lm()
    total, weight = task.loss(task.logits(model.apply, {"params": params}, batch, None), batch)
    return total / weight


def ordinary_step(model, tx, params, state, batch):
    value, gradients = jax.value_and_grad(partial(loss_of, model))(params, batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def take(tree, n):
    return jax.tree.map(lambda x: x[n], tree)


def each_alone(tx, gradients, states, stacked):
    """The transform on every layer's tree by itself, in a loop."""
    layers = []
    for n in range(len(jax.tree.leaves(stacked)[0])):
        updates, state = tx.update(take(gradients, n), take(states, n), take(stacked, n))
        layers.append((optax.apply_updates(take(stacked, n), updates), state))
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def dense_step(loss, tx_layer, tx_rest):
    """The same step from all gradients at once; ``loss(stacked, rest, batch)``."""

    def step(stacked, rest, state, batch):
        value, (g, g_rest) = jax.value_and_grad(loss, (0, 1))(stacked, rest, batch)
        stacked, layers = each_alone(tx_layer, g, state.layers, stacked)
        updates, outside = tx_rest.update(g_rest, state.rest, rest)
        return stacked, optax.apply_updates(rest, updates), LayerwiseState(layers, outside), value

    return step


def same(got, want, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_llama_trains_with_adamw_as_it_does_on_the_whole_gradient(masked):
    config, model, params = llama(
        **({"tie_word_embeddings": True, "qk_norm": True, "sliding_window": 3} if masked else {})
    )
    fused = layerwise_update(llama_parts(config), ADAM, ADAM)
    ours = (*split_layers(params), fused.init(*split_layers(params)))
    theirs, state = params, ADAM.init(params)
    update, plain = jax.jit(fused.update), jax.jit(partial(ordinary_step, model, ADAM))
    for n in range(3):
        *ours, value = update(*ours, batch_of(n, masked))
        theirs, state, expected = plain(theirs, state, batch_of(n, masked))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    same(join_layers(*ours[:2]), theirs, 2e-5)


def test_galore_on_the_stack_is_galore_on_each_layer():
    """The staggered refreshes too: weights take turns within a layer's tree as they do within the stack's."""
    config, model, params = llama()
    stacked, rest = split_layers(params)
    tx = partial(galore, optax.scale_by_adam(eps=1e-3), 3, refresh_every=4, svd="exact")
    sites = lr.linen.sites(model, params, jnp.ones((1, 2), jnp.int32))
    whole = optax.chain(tx(targets=[".*/(attention|mlp)/.*"], sites=sites), *AFTER)
    fused = layerwise_update(llama_parts(config), optax.chain(tx(), *AFTER), ADAM)
    ours, theirs, state = (stacked, rest, fused.init(stacked, rest)), params, whole.init(params)
    update, plain = jax.jit(fused.update), jax.jit(partial(ordinary_step, model, whole))
    for n in range(6):
        *ours, _ = update(*ours, batch_of(n))
        theirs, state, _ = plain(theirs, state, batch_of(n))
    same(join_layers(*ours[:2]), theirs, 1e-4)
    bases = ours[2].layers[0].projected["mlp/up_proj/kernel"].subspace.inputs
    np.testing.assert_allclose(bases, state[0].projected["layers/mlp/up_proj/kernel"].subspace.inputs, atol=1e-3)


def toy(depth, width=64, hidden=1024):
    """Residual layers with more weights than activations; what all share is learned outside and has an integer beside it."""
    parts = ModelParts(
        stem=lambda rest, batch: (batch @ rest["in"], {"gain": jnp.exp(rest["gain"]), "power": jnp.int32(2)}),
        layer=lambda p, x, shared: (
            x + shared["gain"] * (jnp.tanh(x @ p["up"]["kernel"]) ** shared["power"] @ p["down"]["kernel"])
        ),
        head=lambda rest, x, shared, batch: jnp.mean((shared["gain"] * x - rest["out"]) ** 2),
    )
    scaled = lambda *shape, seed: {"kernel": 0.3 * kernel(*shape, seed=seed) / shape[-2] ** 0.5}  # noqa: E731
    stacked = {"up": scaled(depth, width, hidden, seed=1), "down": scaled(depth, hidden, width, seed=2)}
    rest = {"in": kernel(3, width), "gain": jnp.full(width, 0.1), "out": jnp.ones(width)}
    return parts, stacked, rest


def toy_loss(parts):
    def loss(stacked, rest, batch):
        x, shared = parts.stem(rest, batch)
        # As the fused step computes it: the input of each layer is kept, and no more.
        layer = jax.checkpoint(lambda p, x, shared: parts.layer(p, x, shared))
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x, shared), None), x, stacked)
        return parts.head(rest, x, shared, batch)

    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_transform_run_on_each_layer_with_the_whole_gradient(name):
    """GaLore refreshes more than once. What layers share is learned through all of them."""
    parts, stacked, rest = toy(2, 8, 16)
    tx = OPTIMIZERS[name]
    fused = layerwise_update(parts, tx, ADAM)
    ours = theirs = (stacked, rest, fused.init(stacked, rest))
    update, plain = jax.jit(fused.update), jax.jit(dense_step(toy_loss(parts), tx, ADAM))
    for n in range(4):
        *ours, value = update(*ours, kernel(5, 3, seed=n))
        *theirs, expected = plain(*theirs, kernel(5, 3, seed=n))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    same(ours[:2], theirs[:2], 2e-5)
    assert np.abs(ours[1]["gain"] - rest["gain"]).max() > 1e-2
    assert np.abs(ours[0]["up"]["kernel"] - stacked["up"]["kernel"]).max(axis=(1, 2)).min() > 1e-3
    assert ours[2].layers[-1].count.tolist() == [4, 4]


def test_a_loss_that_is_not_finite_changes_nothing():
    """The buffers are donated: the caller could not go back."""
    parts, stacked, rest = toy(3, 8, 16)
    fused = layerwise_update(parts, ADAM, ADAM)
    before = (stacked, rest, fused.init(stacked, rest))
    *after, loss = jax.jit(fused.update)(*before, kernel(5, 3).at[0].set(jnp.inf))
    assert not jnp.isfinite(loss)
    same(after, before, 0)


def test_a_stack_on_a_mesh_stays_where_it_lies():
    parts, stacked, rest = toy(3, 8, 16)
    fused = layerwise_update(parts, ADAM, ADAM)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = jax.tree.map(lambda x: jax.device_put(x, rows), stacked)
    update, batch = jax.jit(fused.update), kernel(5, 3)
    ours = update(placed, rest, fused.init(placed, rest), batch)
    same(ours, update(stacked, rest, fused.init(stacked, rest), batch), 2e-5)
    assert all(x.sharding.is_equivalent_to(rows, 3) for x in jax.tree.leaves(ours[0]))


def memory(step, depth, tx):
    """What the compiler says of a step whose buffers are donated, and the bytes of the stack."""
    parts, stacked, rest = toy(depth)
    state = jax.eval_shape(layerwise_update(parts, tx, ADAM).init, stacked, rest)
    compiled = (
        jax.jit(step(parts, tx), donate_argnums=(0, 1, 2)).lower(stacked, rest, state, jnp.ones((5, 3))).compile()
    )
    return compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(stacked))


def fused_step(parts, tx):
    return layerwise_update(parts, tx, ADAM).update


def stacked_step(parts, tx):
    """All gradients, then the optimizer once for each layer but in one operation."""

    def step(stacked, rest, state, batch):
        value, (g, g_rest) = jax.value_and_grad(toy_loss(parts), (0, 1))(stacked, rest, batch)
        updates, layers = jax.vmap(tx.update)(g, state.layers, stacked)
        others, outside = ADAM.update(g_rest, state.rest, rest)
        new = optax.apply_updates(stacked, updates), optax.apply_updates(rest, others)
        return *new, LayerwiseState(layers, outside), value

    return step


@pytest.mark.parametrize("inner", [optax.scale_by_adam(), galore(optax.scale_by_adam(), 2)], ids=["adamw", "galore"])
def test_the_whole_gradient_never_exists(inner):
    tx = optax.chain(inner, *AFTER)
    ours, gradient = memory(fused_step, 32, tx)
    # All that is given is written in place; only the loss is new.
    assert ours.output_size_in_bytes - ours.alias_size_in_bytes < 1024
    # A layer's gradient, and its weights and moments before and after.
    assert ours.temp_size_in_bytes < 7 / 32 * gradient
    dense, _ = memory(stacked_step, 32, tx)
    assert dense.temp_size_in_bytes - ours.temp_size_in_bytes > 0.8 * gradient


def test_a_deeper_model_needs_no_more_than_the_inputs_of_its_layers():
    temps = [memory(fused_step, depth, ADAM)[0].temp_size_in_bytes for depth in (8, 24)]
    assert temps[1] - temps[0] < 16 * 5 * 64 * 4 + 1024


def primitives(jaxpr, within=()):
    """Every operation's name with the names of those around it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, within
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, (*within, equation.primitive.name))


def test_a_refresh_is_computed_only_when_it_is_due():
    """Under vmap a condition becomes a choice between two results that are both computed; in the loop it stays one."""
    parts, stacked, rest = toy(3, 32, 48)
    fused = layerwise_update(parts, galore(optax.scale_by_adam(), 3), ADAM)
    args = (stacked, rest, jax.eval_shape(fused.init, stacked, rest), jnp.ones((5, 3)))
    seen = list(primitives(jax.make_jaxpr(fused.update)(*args).jaxpr))
    decompositions = [within for name, within in seen if name in ("eigh", "cholesky")]
    assert decompositions and all("cond" in within for within in decompositions)


def test_bad_input_is_refused_by_name():
    parts, stacked, rest = toy(4, 8, 16)
    fused = layerwise_update(parts, ADAM, ADAM)
    with pytest.raises(ValueError, match="the stack has no leaves"):
        fused.init({}, rest)
    with pytest.raises(ValueError, match=r"the stack begins with down of shape \(0, 2\)"):
        fused.init({"down": jnp.ones((0, 2))}, rest)
    with pytest.raises(
        ValueError, match=r"up/kernel of the stack has shape \(3, 8, 16\), but down/kernel has 4 layers; expected \[4"
    ):
        fused.init({**stacked, "up": {"kernel": stacked["up"]["kernel"][1:]}}, rest)
    with pytest.raises(ValueError, match=r"scale of the stack has shape \(\), but down/kernel has 4 layers"):
        fused.init({**stacked, "scale": jnp.float32(1)}, rest)
    fewer = fused.init(jax.tree.map(lambda x: x[:3], stacked), rest)
    with pytest.raises(ValueError, match=r"0/count of the state has shape \(3,\), but down/kernel has 4 layers"):
        fused.update(stacked, rest, fewer, jnp.ones((5, 3)))
    rows = parts._replace(head=lambda rest, x, shared, batch: x.mean(-1))
    with pytest.raises(ValueError, match=r"head has to return a scalar, got shape \(5,\)"):
        layerwise_update(rows, ADAM, ADAM).update(stacked, rest, fused.init(stacked, rest), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"No stacked layers among \['layers_0', 'norm'\]"):
        split_layers({"layers_0": {}, "norm": {}})
